"""What processes do first, and the children at the end."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from typing import NoReturn


def configure_logging() -> None:
    """One short line per event on stderr; LitServe and uvicorn speak up for warnings only."""
    logger = logging.getLogger("gpt_serve")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def guard_child() -> None:
    """Leave signals to the parent, and do not outlive it.

    Ctrl-C and some service managers signal the whole process group; a child that obeyed would die while the parent
    still drains. A parent that was killed outright cannot stop its children, so each watches it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent.sentinel,), name="parent-watch", daemon=True).start()


def end_child() -> NoReturn:
    """End this process at once. The parent notices, and is the one to tell why."""
    os._exit(1)


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    end_child()
