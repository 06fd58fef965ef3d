"""Threads that take what others leave of the processor."""

import os
import sys
import threading

NICENESS = 10  # weighs about a tenth of a thread with none, where both want a core


def yield_to_others() -> None:
    """Give this thread, and those that it starts, a low priority; for good. Only Linux has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
