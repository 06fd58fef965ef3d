"""The folder that downloaded data sets are kept in."""

import os
from pathlib import Path

from gpt_serve.errors import DataError


def data_root() -> Path:
    """Find the folder: ``$GPT_SERVE_DATA``, or ``gpt-serve/data`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        DataError: there is no such place.
    """
    if given := os.environ.get("GPT_SERVE_DATA"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        raise DataError("there is no folder for data sets: name one in GPT_SERVE_DATA")
    return Path(cache) / "gpt-serve" / "data"
