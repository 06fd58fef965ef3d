"""Adapter files in a folder: ``root/<task>/adapter.safetensors``."""

import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from gpt_serve.adapters.parse import MAX_FILE_BYTES
from gpt_serve.adapters.source import FILE_NAME, Signature
from gpt_serve.errors import InvalidAdapter, UsageError


class Folder:
    """A folder on a disk, see `AdapterSource`; read as it is at each call.

    Args:
        root: may be missing or empty: then there are no tasks yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def names(self) -> list[str]:
        """Return the names of everything in the folder."""
        try:
            with os.scandir(self.root) as entries:
                return [entry.name for entry in entries]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"the adapter folder {self.root} cannot be read: {error.strerror}") from error

    def signature(self, task: str) -> Signature:
        """Return the current version of the task's file, for the cost of one ``stat``."""
        return Signature.of(os.stat(self._path(task)))

    def read(self, task: str) -> tuple[bytes, Signature]:
        """The file's bytes and the version that they are."""
        return _read(self._path(task))

    def prepare(self, tasks: Sequence[str]) -> None:
        """Nothing: a disk is near."""

    def write(self, task: str, data: bytes) -> None:
        """Write to a temporary name and move into place; after a failure the old file is there."""
        path = self._path(task)
        temporary = path.with_name(f".{FILE_NAME}.{secrets.token_hex(6)}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        _sync_folder(self.root)

    def _path(self, task: str) -> Path:
        return self.root / task / FILE_NAME


def _read(path: Path) -> tuple[bytes, Signature]:
    # Non-blocking: a FIFO in the place of the file must not hang the reader.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidAdapter("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise InvalidAdapter(f"the file has {status.st_size} bytes, more than the {MAX_FILE_BYTES} allowed")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(status.st_size + 1)
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    # Not the time of change, which a file gets, too, when another one takes its place and name.
    if (after.st_mtime_ns, after.st_size) != (status.st_mtime_ns, status.st_size) or len(data) != status.st_size:
        raise InvalidAdapter("the file changed while it was read: replace it with a rename, not in place")
    return data, Signature.of(status)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
