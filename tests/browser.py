"""What tests need that drive a browser: Chromium, or a reason to skip."""

import os
import shutil
from typing import NoReturn

import pytest

# The sandbox cannot be had as root or in a container, and the pages are our own. The camera is a made-up one.
FLAGS = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


def program(*names: str) -> str:
    """The path of the first of these programs that is installed."""
    for name in names:
        if path := shutil.which(name):
            return path
    return missing(" or ".join(names))


def chromium() -> str:
    """The browser's path."""
    return program("chromium", "chromium-browser", "google-chrome")


def missing(what: str) -> NoReturn:
    """Skip; but ``.ci/run`` installs everything, and these tests would be the first to be silently lost."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"needs {what}, which .ci/run installs")
    pytest.skip(f"needs {what}: README.md, 'Tests'")
