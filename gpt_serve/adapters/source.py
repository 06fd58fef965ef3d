"""Where adapter files lie: what a folder, a bucket and a hub have in common."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

FILE_NAME = "adapter.safetensors"


@dataclass(frozen=True)
class Signature:
    """Tells one version of a file from another without reading it.

    Attributes:
        size: bytes.
        version: what the place calls this version: device, inode and the times of the last modification and change on
            a disk, a hash of the entity tags in a bucket.
    """

    size: int
    version: str

    @classmethod
    def of(cls, status: os.stat_result) -> "Signature":
        """Of a file on a disk.

        The time of change is what no tool sets: a replaced file may have the size, the modification time (``cp -p``,
        reproducible archives) and, when the old one is gone, the inode of the one that it replaces.
        """
        return cls(status.st_size, f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_dev}-{status.st_ino}")


class AdapterSource(Protocol):
    """Files by task; ``str(source)`` says where. Safe to share between threads.

    Every ``task`` that is passed in is a valid name.

    `OSError` means that the place cannot tell now; `FileNotFoundError`, that the task has no file.
    """

    def names(self) -> list[str]:
        """Of entries that may be tasks, in any order.

        Raises:
            UsageError: the place cannot be listed.
        """
        ...

    def signature(self, task: str) -> Signature:
        """The version that `read` would return now. Cheap: it is asked for each request."""
        ...

    def read(self, task: str) -> tuple[bytes, Signature]:
        """The file, and its version.

        Raises:
            InvalidAdapter: the file cannot be an adapter, or is not what its publisher wrote.
        """
        ...

    def prepare(self, tasks: Sequence[str]) -> None:
        """All of these will be read: get them at once where that is faster than one by one. Raises nothing."""
        ...

    def write(self, task: str, data: bytes) -> None:
        """Put or replace the file; readers see the old one or the new one, never a part."""
        ...
