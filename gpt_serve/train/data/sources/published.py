"""The tables of published data sets in ``datasets.toml``."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def published(kind: str) -> dict[str, Any]:
    """Read a table of ``datasets.toml``: ``fgvc``, ``vtab`` or ``torchvision``."""
    text = (files("gpt_serve.train.data") / "datasets.toml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = tomllib.loads(text)
    return tables[kind]
