"""One adapter with its card, from a folder to a store elsewhere and back: byte for byte, so that the revision stays."""

from pathlib import Path
from typing import Any

from gpt_serve.adapters.bucket import Bucket
from gpt_serve.adapters.folder import Folder
from gpt_serve.adapters.hub import push_to_hub
from gpt_serve.adapters.mirror import Mirror
from gpt_serve.adapters.source import FILE_NAME
from gpt_serve.adapters.store import POLL_SECONDS, AdapterStore
from gpt_serve.errors import UnknownTask, UsageError
from gpt_serve.files import replacing
from gpt_serve.specs import check_task_name

CARD = ("README.md", "gates.png", "confusion.png", "sweep.json", "sweep.md", "sweep.png")
"""What may lie beside an adapter and goes with it."""


def push(folder: Path, task: str, address: str) -> dict[str, Any]:
    """Copy a task's adapter and card to ``address``, where they replace what the task has there.

    Returns:
        ``task``, ``revision``, ``to`` and the names of the ``files``.

    Raises:
        AdapterError: there is no such task, or its file is refused.
        UsageError: the other side, or the disk, refuses.
    """
    stored = AdapterStore(folder).load(task)
    bucket = Bucket(address)
    try:
        files = {name: (folder / task / name).read_bytes() for name in CARD if (folder / task / name).exists()}
        files[FILE_NAME] = stored.data
        if bucket.scheme == "hf":
            push_to_hub(bucket, stored.adapter, files)
        else:
            bucket.write(task, files)
    except OSError as error:
        raise UsageError(f"adapter {task!r} cannot be pushed: {error.strerror}") from error
    return {"task": task, "revision": stored.revision, "to": bucket.address, "files": sorted(files)}


def pull(address: str, task: str, folder: Path) -> dict[str, Any]:
    """Copy a task's adapter and card from ``address`` into ``folder``, the adapter last.

    Returns:
        ``task``, ``revision``, ``to`` and the names of the ``files``.

    Raises:
        AdapterError: there is no such task, its file is refused, or has not the digest that its publisher wrote.
        UsageError: the other side, or the disk, refuses.
    """
    check_task_name(task)
    mirror = Mirror.of(address, POLL_SECONDS)
    if task not in mirror.names():
        raise UnknownTask(f"there is no task {task!r} in {mirror}")
    stored = AdapterStore(mirror).load(task)
    try:
        beside = {name: data for name, data in mirror.bucket.companions(task).items() if name in CARD}
        (folder / task).mkdir(parents=True, exist_ok=True)
        for name, data in beside.items():
            with replacing(folder / task / name) as temporary:
                temporary.write_bytes(data)
        Folder(folder).write(task, stored.data)
    except OSError as error:
        raise UsageError(f"adapter {task!r} cannot be pulled: {error.strerror}") from error
    return {"task": task, "revision": stored.revision, "to": str(folder / task), "files": sorted([*beside, FILE_NAME])}
