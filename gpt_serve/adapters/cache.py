"""Adapter files that were fetched, on the local disk: shared by the processes of a machine, free to be deleted."""

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from gpt_serve.files import replacing

logger = logging.getLogger("gpt_serve.adapters")

MAX_BYTES = 10 * 2**30
GRACE_SECONDS = 3600  # another process may still answer with a version that was replaced


class AdapterCache:
    """Files by task and version, each under a name that holds its digest, by which it is verified when it is read.

    Args:
        folder: is made when something is put into it.
        max_bytes: the least recently used leave first.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, task: str, version: str) -> bytes | None:
        """That version of the task's file; None when it is not here, or is no longer what was put."""
        for path in self._paths(task, version):
            try:
                data = path.read_bytes()
                os.utime(path)  # it was used
            except OSError:
                continue  # deleted meanwhile, as anybody may
            if hashlib.sha256(data).hexdigest() == path.stem.partition("-")[2]:
                return data
            logger.warning("%s was damaged on the disk and is fetched again", path)
            path.unlink(missing_ok=True)
        return None

    def has(self, task: str, version: str) -> bool:
        """Whether `get` would look at a file."""
        return bool(self._paths(task, version))

    def put(self, task: str, version: str, data: bytes) -> None:
        """Keep ``data``; a disk that refuses costs time, no answer."""
        path = self.folder / task / f"{version}-{hashlib.sha256(data).hexdigest()}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            logger.warning("adapter %r cannot be kept in %s: %s", task, self.folder, error.strerror)

    def prune(self, versions: Mapping[str, str]) -> None:
        """Delete what is no longer current, after a grace, and what is over the limit.

        Args:
            versions: the current one of each task.
        """
        now = time.time()
        files = []
        for path in self.folder.glob("*/*-*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            old = path.stem.partition("-")[0] != versions.get(path.parent.name)
            if old and status.st_mtime < now - GRACE_SECONDS:
                path.unlink(missing_ok=True)
            else:
                files.append((status.st_mtime, status.st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            used -= size

    def _paths(self, task: str, version: str) -> list[Path]:
        return list((self.folder / task).glob(f"{version}-*.safetensors"))
