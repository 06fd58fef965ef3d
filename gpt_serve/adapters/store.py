"""Adapters on disk: ``root/<task>/adapter.safetensors``, validated on load and published atomically."""

import contextlib
import os
import secrets
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_serve.adapters.adapter import Adapter, revision_of
from gpt_serve.adapters.file import MAX_FILE_BYTES
from gpt_serve.errors import AdapterError, InvalidAdapter, InvalidTaskName, UnknownTask, UsageError
from gpt_serve.specs import BackboneSpec, check_task_name

FILE_NAME = "adapter.safetensors"


@dataclass(frozen=True)
class Signature:
    """Tells one version of a file from another without reading it."""

    modified_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Signature":
        return cls(status.st_mtime_ns, status.st_size, status.st_ino)


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """An adapter with the very bytes it was read from, their revision and the file's signature."""

    adapter: Adapter
    data: bytes
    revision: str
    signature: Signature

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.data)


@dataclass(frozen=True)
class TaskSummary:
    """An adapter without its tensors; accuracies in [0, 1]."""

    task: str
    method: str
    backbone: str
    labels: tuple[str, ...]
    prompts: int
    nbytes: int
    revision: str
    val_accuracy: float | None
    created: str

    @property
    def classes(self) -> int:
        """``C``."""
        return len(self.labels)

    def to_dict(self) -> dict[str, Any]:
        """As listed by ``gpt-serve tasks --json`` and ``GET /tasks``."""
        return {
            "task": self.task,
            "method": self.method,
            "backbone": self.backbone,
            "classes": self.classes,
            "prompts": self.prompts,
            "size_bytes": self.nbytes,
            "revision": self.revision,
            "val_accuracy": self.val_accuracy,
            "created": self.created,
        }


@dataclass(frozen=True)
class BrokenAdapter:
    """A task whose file is refused, and why."""

    task: str
    error: AdapterError

    def to_dict(self) -> dict[str, Any]:
        """As listed by ``gpt-serve tasks --json`` and ``GET /tasks``."""
        return {"task": self.task, "error": str(self.error)}


class AdapterStore:
    """The adapters in one folder; safe to share between threads, and with other processes that publish.

    Args:
        root: may be missing or empty: then there are no tasks yet.
        spec: when given, adapters of other backbones are refused.
    """

    def __init__(self, root: str | Path, spec: BackboneSpec | None = None) -> None:
        self.root = Path(root)
        self.spec = spec
        self._described: dict[str, tuple[Signature, TaskSummary | BrokenAdapter]] = {}
        self._lock = threading.Lock()

    def tasks(self) -> list[str]:
        """Sorted names of the folders that hold an adapter file, valid or not.

        Raises:
            UsageError: the folder exists but cannot be listed.
        """
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise UsageError(f"the adapter folder {self.root} cannot be read: {error.strerror}") from error
        found = sorted(name for name in names if self._holds_adapter(name))
        with self._lock:  # what was removed is forgotten
            self._described = {name: self._described[name] for name in found if name in self._described}
        return found

    def _holds_adapter(self, name: str) -> bool:
        try:
            self.signature(name)
        except (InvalidTaskName, UnknownTask):
            return False
        except InvalidAdapter:
            pass  # there, but unreadable: `describe` says so
        return True

    def signature(self, task: str) -> Signature:
        """The current version of the task's file, for the cost of one ``stat``.

        Raises:
            InvalidTaskName: before the disk is touched.
            UnknownTask: there is no file.
            InvalidAdapter: the disk does not tell.
        """
        try:
            return Signature.of(os.stat(self._path(task)))
        except OSError as error:
            raise _unreadable(task, error) from error

    def load(self, task: str, spec: BackboneSpec | None = None) -> StoredAdapter:
        """Read and validate the task's file; content, revision and signature belong together.

        Args:
            spec: backbone to check against instead of the store's.

        Raises:
            InvalidTaskName, UnknownTask: as `signature`.
            InvalidAdapter: the file is not a valid adapter of this task.
            BackboneMismatch: it was trained on another backbone.
        """
        path = self._path(task)
        try:
            data, signature = _read(path)
            adapter = _parse(data, task, spec or self.spec)
            return StoredAdapter(adapter, data, revision_of(data), signature)
        except OSError as error:
            raise _unreadable(task, error) from error
        except AdapterError as error:
            reason = error
        # Raised out here, without a chain: whoever keeps the error must not keep the file's bytes with it.
        raise type(reason)(f"adapter {task!r} is refused: {reason}")

    def describe(self) -> list[TaskSummary | BrokenAdapter]:
        """Every task by name, the refused ones with their reason; unchanged files are not read again."""
        described = []
        for task in self.tasks():
            with contextlib.suppress(UnknownTask):  # removed since it was listed
                described.append(self._describe(task))
        return described

    def summary(self, task: str) -> TaskSummary:
        """The task without its tensors; an unchanged file is not read again.

        Raises:
            AdapterError: as `load`.
        """
        described = self._describe(task)
        if isinstance(described, BrokenAdapter):
            raise described.error.fresh()
        return described

    def _describe(self, task: str) -> TaskSummary | BrokenAdapter:
        described: TaskSummary | BrokenAdapter
        signature = None
        try:
            signature = self.signature(task)
            with self._lock:
                known = self._described.get(task)
            if known is not None and known[0] == signature:
                return known[1]
            stored = self.load(task)
        except (InvalidTaskName, UnknownTask):
            raise
        except AdapterError as error:
            if isinstance(error.__cause__, OSError):
                signature = None  # the disk's trouble may pass without a trace in the signature
            described = BrokenAdapter(task, error.with_traceback(None))
        else:
            signature, described = stored.signature, _summarise(stored)
        if signature is not None:
            with self._lock:
                self._described[task] = signature, described
        return described

    def publish(self, adapter: Adapter) -> str:
        """Write or replace an adapter; readers see the old file or the new one, never a part.

        Returns:
            The new revision.

        Raises:
            InvalidTaskName, InvalidAdapter, BackboneMismatch: nothing is written that `load` would refuse.
            UsageError: the disk refuses; the old file is still there, unless only the last sync failed.
        """
        path = self._path(adapter.task)
        data = adapter.to_bytes()
        if self.spec is not None:
            adapter.check_backbone(self.spec)
        temporary = path.with_name(f".{FILE_NAME}.{secrets.token_hex(6)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_synced(temporary, data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
            _sync_folder(self.root)
        except OSError as error:
            raise UsageError(
                f"adapter {adapter.task!r} cannot be written to {path.parent}: {error.strerror}"
            ) from error
        return revision_of(data)

    def _path(self, task: str) -> Path:
        return self.root / check_task_name(task) / FILE_NAME


def _unreadable(task: str, error: OSError) -> AdapterError:
    """What it means that a task's file cannot be reached; the message names no path."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnknownTask(f"unknown task {task!r}: train it, or look at the list of tasks")
    return InvalidAdapter(f"adapter {task!r} is refused: the file cannot be read: {error.strerror}")


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
        signature = Signature.of(os.fstat(descriptor))
    finally:
        os.close(descriptor)
    if signature != Signature.of(status) or len(data) != status.st_size:
        raise InvalidAdapter("the file changed while it was read: replace it with a rename, not in place")
    return data, signature


def _parse(data: bytes, task: str, spec: BackboneSpec | None) -> Adapter:
    adapter = Adapter.from_bytes(data)
    if adapter.task != task:
        raise InvalidAdapter(f"the file belongs to task {adapter.task!r}")
    if spec is not None:
        adapter.check_backbone(spec)
    return adapter


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


def _summarise(stored: StoredAdapter) -> TaskSummary:
    adapter = stored.adapter
    return TaskSummary(
        task=adapter.task,
        method=adapter.method,
        backbone=adapter.backbone,
        labels=adapter.labels,
        prompts=adapter.prompts,
        nbytes=stored.nbytes,
        revision=stored.revision,
        val_accuracy=_val_accuracy(adapter.training),
        created=adapter.created,
    )


def _val_accuracy(training: dict[str, Any]) -> float | None:
    """The metric if it is one: ``training`` may hold anything."""
    metrics = training.get("metrics")
    value = metrics.get("val_accuracy") if isinstance(metrics, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        return None
    return float(value)
