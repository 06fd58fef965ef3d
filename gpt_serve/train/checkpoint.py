"""What an interrupted run leaves behind: a folder for each task, held by one process at a time."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from filelock import FileLock, Timeout

from gpt_serve.errors import UsageError
from gpt_serve.files import replacing


def run_folder(adapters: Path, task: str) -> Path:
    """Where runs of ``task`` store what resuming needs: no other task's run reads, writes or removes anything there."""
    return adapters / ".train" / task


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a `run_folder` and keep other processes out of it until the block ends; it goes when it is empty then.

    The lock is a file beside the folder. It stays, as whoever removes a lock takes it from those who wait for it. The
    system gives it free when its process ends, however that happens.

    Raises:
        UsageError: another process trains the task, or the disk refuses: this is known before anything trains.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), blocking=False)  # no task's name begins with a dot
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder.parent):  # a lock that cannot be written is one that is taken, to filelock
            pass
        lock.acquire()
        folder.mkdir(exist_ok=True)
    except Timeout as error:
        raise UsageError(
            f"{folder.name!r} is being trained in {folder.parent.parent} by another process: "
            "wait for its end, or choose another --task"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"the folder {folder.parent} cannot be made or written to: {reason}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # something is left to resume
            folder.rmdir()
        lock.release()


class RunCheckpoint:
    """The state of one training run at ``adapters/.train/<task>/checkpoint.pt``.

    Args:
        adapters: the adapter folder.
        task: the task's name.
    """

    def __init__(self, adapters: Path, task: str) -> None:
        self.path = run_folder(adapters, task) / "checkpoint.pt"

    def exists(self) -> bool:
        """Whether an interrupted run is stored."""
        return self.path.is_file()

    def save(self, identity: dict[str, Any], state: dict[str, Any]) -> None:
        """Store ``state`` in place of the one before; a crash leaves the old one.

        Args:
            identity: what must be equal for a run to continue (recipe, backbone, data), as plain JSON values.
            state: tensors and plain data.
        """
        try:
            with replacing(self.path) as temporary:
                torch.save({"identity": identity, "state": state}, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            reason = getattr(error, "strerror", None) or "is the disk full?"
            raise UsageError(f"the checkpoint {self.path} cannot be written: {reason}") from error

    def require(self) -> None:
        """Raise `UsageError` when there is no stored run."""
        if not self.exists():
            raise UsageError(f"nothing to resume: {self.path} does not exist; train without --resume")

    def load(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Read the stored state.

        Raises:
            UsageError: there is none, it is damaged, or it belongs to other settings (they are named).
        """
        self.require()
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            stored, state = content["identity"], content["state"]
        except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise UsageError(f"checkpoint {self.path} is damaged: delete it and train anew") from error
        changed = sorted(key for key in identity if stored.get(key) != identity[key])
        if changed:
            values = ", ".join(f"{key} was {stored.get(key)} and is {identity[key]}" for key in changed)
            raise UsageError(f"--resume: the interrupted run had other settings ({values}); repeat them or train anew")
        return dict(state)

    def holds(self, identity: dict[str, Any]) -> bool:
        """Whether a run is stored that `load` would continue."""
        try:
            self.load(identity)
        except UsageError:
            return False
        return True

    def delete(self) -> None:
        """Forget the run; called once its adapter is published."""
        self.path.unlink(missing_ok=True)
