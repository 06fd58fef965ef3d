"""What an interrupted run leaves behind: one file per task, replaced after each epoch."""

import contextlib
import pickle
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from gpt_serve.errors import UsageError
from gpt_serve.files import replacing


class RunCheckpoint:
    """The state of one training run at ``adapters/.train/<task>.pt``.

    Args:
        adapters: the adapter folder.
        task: the task's name.
    """

    def __init__(self, adapters: Path, task: str) -> None:
        self.path = adapters / ".train" / f"{task}.pt"

    def exists(self) -> bool:
        """Whether an interrupted run is stored."""
        return self.path.is_file()

    def prepare(self) -> None:
        """Make the folder, so that one that cannot be written to is known before anything trains.

        Raises:
            UsageError: it cannot be made or written to.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(f"the folder {folder} cannot be made or written to: {error.strerror}") from error

    def save(self, identity: dict[str, Any], state: dict[str, Any]) -> None:
        """Replace the stored state; a crash leaves the old one.

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
        """The stored state.

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
        with contextlib.suppress(OSError):  # other runs still keep theirs in the folder
            self.path.parent.rmdir()
