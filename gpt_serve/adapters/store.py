"""The adapters of a folder, a bucket or a hub: validated on load and published atomically."""

import contextlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_serve.adapters.adapter import Adapter, revision_of
from gpt_serve.adapters.folder import Folder
from gpt_serve.adapters.source import FILE_NAME as FILE_NAME
from gpt_serve.adapters.source import AdapterSource
from gpt_serve.adapters.source import Signature as Signature
from gpt_serve.errors import AdapterError, InvalidAdapter, InvalidTaskName, UnknownTask, UsageError
from gpt_serve.specs import BackboneSpec, Kind, check_task_name

POLL_SECONDS = 30.0
"""Time between two listings of a bucket or hub."""


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
    """An adapter without its tensors; accuracy, of classification, and mIoU, of segmentation, in [0, 1]."""

    task: str
    kind: Kind
    method: str
    backbone: str
    labels: tuple[str, ...]
    prompts: int
    nbytes: int
    revision: str
    val_accuracy: float | None
    val_miou: float | None
    created: str

    @property
    def classes(self) -> int:
        """``C``."""
        return len(self.labels)

    def to_dict(self) -> dict[str, Any]:
        """As listed by ``gpt-serve tasks --json`` and ``GET /tasks``."""
        return {
            "task": self.task,
            "kind": self.kind,
            "method": self.method,
            "backbone": self.backbone,
            "classes": self.classes,
            "prompts": self.prompts,
            "size_bytes": self.nbytes,
            "revision": self.revision,
            "val_accuracy": self.val_accuracy,
            "val_miou": self.val_miou,
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
    """The adapters of one place; safe to share between threads, and with other processes that publish.

    Args:
        root: a folder, which may be missing or empty, or the address of a store elsewhere: ``s3://bucket/prefix``,
            ``gs://bucket/prefix``, ``file:///path`` or ``hf://owner/repo`` (see `gpt_serve.adapters.mirror`), or an
            `AdapterSource`.
        spec: when given, adapters of other backbones are refused.
        poll_seconds: how often a store elsewhere is listed; a folder is read at each call.

    Raises:
        UsageError: the address is none, or what is there cannot be listed.
    """

    def __init__(
        self, root: str | Path | AdapterSource, spec: BackboneSpec | None = None, *, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self.spec = spec
        self.source = _source(root, poll_seconds) if isinstance(root, str | Path) else root
        self._described: dict[str, tuple[Signature, TaskSummary | BrokenAdapter]] = {}
        self._lock = threading.Lock()

    @property
    def root(self) -> Path:
        """The folder.

        Raises:
            UsageError: the store is elsewhere.
        """
        if not isinstance(self.source, Folder):
            raise UsageError("this needs a folder of adapters: pull them first, see gpt-serve pull --help")
        return self.source.root

    def tasks(self) -> list[str]:
        """Sorted names of the tasks that have an adapter file, valid or not.

        Raises:
            UsageError: the place cannot be listed.
        """
        found = sorted(name for name in self.source.names() if self._holds_adapter(name))
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
        """The current version of the task's file, for the cost of one ``stat`` or less.

        Raises:
            InvalidTaskName: before the disk is touched.
            UnknownTask: there is no file.
            InvalidAdapter: the disk does not tell.
        """
        try:
            return self.source.signature(check_task_name(task))
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
        check_task_name(task)
        try:
            data, signature = self.source.read(task)
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
        tasks = self.tasks()
        self.source.prepare(tasks)
        for task in tasks:
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
        check_task_name(adapter.task)
        data = adapter.to_bytes()
        if self.spec is not None:
            adapter.check_backbone(self.spec)
        try:
            self.source.write(adapter.task, data)
        except OSError as error:
            raise UsageError(
                f"adapter {adapter.task!r} cannot be written to {self.source}/{adapter.task}: {error.strerror}"
            ) from error
        return revision_of(data)


def _source(root: str | Path, poll_seconds: float) -> AdapterSource:
    if isinstance(root, Path) and re.match(r"[a-z0-9]+:/", str(root)):
        raise UsageError(f"{root} was an address before it became a Path, which drops a slash: give it as a string")
    if isinstance(root, Path) or "://" not in root:
        return Folder(Path(root))
    from gpt_serve.adapters.mirror import Mirror  # fsspec, and what it needs for the address

    return Mirror.of(root, poll_seconds)


def _unreadable(task: str, error: OSError) -> AdapterError:
    """What it means that a task's file cannot be reached; the message names no path."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnknownTask(f"unknown task {task!r}: train it, or look at the list of tasks")
    return InvalidAdapter(f"adapter {task!r} is refused: the file cannot be read: {error.strerror}")


def _parse(data: bytes, task: str, spec: BackboneSpec | None) -> Adapter:
    adapter = Adapter.from_bytes(data)
    if adapter.task != task:
        raise InvalidAdapter(f"the file belongs to task {adapter.task!r}")
    if spec is not None:
        adapter.check_backbone(spec)
    return adapter


def _summarise(stored: StoredAdapter) -> TaskSummary:
    adapter = stored.adapter
    return TaskSummary(
        task=adapter.task,
        kind=adapter.kind,
        method=adapter.method,
        backbone=adapter.backbone,
        labels=adapter.labels,
        prompts=adapter.prompts,
        nbytes=stored.nbytes,
        revision=stored.revision,
        val_accuracy=_metric(adapter.training, "val_accuracy"),
        val_miou=_metric(adapter.training, "val_miou"),
        created=adapter.created,
    )


def _metric(training: dict[str, Any], name: str) -> float | None:
    """The metric if it is one: ``training`` may hold anything."""
    metrics = training.get("metrics")
    value = metrics.get(name) if isinstance(metrics, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        return None
    return float(value)
