"""Files that are replaced as a whole, work that only one process does, and the place for what may be deleted."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; at the end it takes its place, and after a failure the old file is there.

    Threads and processes that replace the same file do not disturb each other: the last one's is there in the end.

    Raises:
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Of all threads and processes that ask for the lock file ``path``, one at a time goes on; a killed one holds none.

    Raises:
        OSError: the disk refuses.
    """
    with TemporaryFile(dir=path.parent):  # to filelock, a folder that cannot be written is a lock that is taken
        pass
    with FileLock(path):
        yield


def cache_folder() -> Path:
    """Where what can be had again is kept: ``$XDG_CACHE_HOME/gpt-serve``, by default ``~/.cache/gpt-serve``.

    Raises:
        OSError: there is no such place: the process has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise OSError(errno.ENOENT, "not an absolute path", root)
    return Path(root) / "gpt-serve"
