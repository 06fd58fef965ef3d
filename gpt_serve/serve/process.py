"""What processes do first, and the children at the end."""

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import NoReturn

MAX_DEATHS = 5  # this many deaths of a child ...
DEATH_WINDOW = 60.0  # ... within this many seconds are a crash loop
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def configure_logging() -> None:
    """One short line per event on stderr; LitServe and uvicorn speak up for warnings only."""
    logger = logging.getLogger("gpt_serve")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what strangers send is no news


@contextmanager
def holding_signals() -> Iterator[None]:
    """Have this thread's SIGINT and SIGTERM wait. A child that is spawned meanwhile begins so, until `guard_child`.

    Without it, Ctrl-C during a child's first moments kills the child, which looks like a backbone that cannot load.
    """
    resource_tracker.ensure_running()  # it comes with the first child, and its start lets signals through again
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def guard_child() -> None:
    """Leave signals to the parent, and do not outlive it.

    Ctrl-C and some service managers signal the whole process group; a child that obeyed would die while the parent
    still drains. A parent that was killed outright cannot stop its children, so each watches it.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent.sentinel,), name="parent-watch", daemon=True).start()


def readable(sentinel: int) -> asyncio.Event:
    """An event that is set once the process of ``sentinel`` has ended."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(sentinel)
        event.set()

    loop.add_reader(sentinel, ended)
    return event


def end_child() -> NoReturn:
    """End this process at once. The parent notices, and is the one to tell why."""
    os._exit(1)


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    end_child()
