"""What trials of a sweep came to, and the finished ones on disk: what an interrupted sweep leaves behind."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt_serve.errors import UsageError
from gpt_serve.files import replacing
from gpt_serve.train.checkpoint import run_folder
from gpt_serve.train.loop import Score
from gpt_serve.train.recipes.recipe import Recipe


@dataclass(frozen=True)
class Outcome:
    """What a trial has come to so far.

    Attributes:
        seconds: since it began.
        epochs: finished ones.
        best_epoch: by validation, from 0.
        val_accuracy: of that epoch, a share in [0, 1].
        val_loss: of that epoch.
        failure: why it failed; None when it did not.
    """

    seconds: float = 0.0
    epochs: int = 0
    best_epoch: int | None = None
    val_accuracy: float | None = None
    val_loss: float | None = None
    failure: str | None = None

    @property
    def score(self) -> Score | None:
        """On validation images; None of a trial that failed."""
        if self.failure is not None or self.val_accuracy is None or self.val_loss is None:
            return None
        return Score(self.val_accuracy, self.val_loss)

    def to_dict(self, epochs: int) -> dict[str, Any]:
        """Plain JSON values, with the ``status`` of a trial of so many ``epochs``."""
        status = "failed" if self.score is None else "stopped" if self.epochs < epochs else "finished"
        return {"status": status, **asdict(self), "seconds": round(self.seconds, 1)}

    def __str__(self) -> str:
        score = self.score
        if score is None or self.best_epoch is None:
            return f"failed: {self.failure}"
        return f"val {100 * score.accuracy:.1f} % (epoch {self.best_epoch + 1} of {self.epochs}), {self.seconds:.0f} s"


@dataclass(frozen=True)
class Trial:
    """A recipe and what it came to."""

    recipe: Recipe
    outcome: Outcome


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """By the validation score that the recipes select epochs by, then by order; None when all failed."""
    scored = [(trial, score) for trial in trials if (score := trial.outcome.score) is not None]
    return max(scored, key=lambda pair: pair[1].rank(pair[0].recipe.select))[0] if scored else None


class TrialStore:
    """Finished trials of an unfinished sweep, a file each, in ``adapters/.train/<task>/trials/``.

    Args:
        adapters: the adapter folder.
        task: the task's name.
    """

    def __init__(self, adapters: Path, task: str) -> None:
        self.task = task
        self.path = run_folder(adapters, task) / "trials"

    def count(self) -> int:
        """Finished trials."""
        return len(self._files())

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.json"))

    def check(self, *, resume: bool) -> None:
        """Raise `UsageError` when there is nothing to resume, or finished trials would be lost."""
        if resume and not self.path.is_dir():
            raise UsageError(f"nothing to resume: {self.path} does not exist; sweep without --resume")
        if not resume and self._files():
            raise UsageError(
                f"an unfinished sweep of {self.task!r} has {self.count()} trials done: "
                f"add --resume to continue it, or delete {self.path} to begin anew"
            )

    def prepare(self) -> None:
        """Make the folder, so that one that cannot be written to is known before anything trains.

        Raises:
            UsageError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the folder {self.path} cannot be made: {error.strerror}") from error

    def save(self, identity: dict[str, Any], outcome: Outcome) -> None:
        """Keep a finished trial; a crash leaves no part of a file.

        Args:
            identity: what tells it from others (recipe, backbone, data), as plain JSON values.
        """
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        text = json.dumps({"identity": identity, "outcome": asdict(outcome)})
        try:
            with replacing(self.path / f"{name}.json") as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the trial cannot be written to {self.path}: {error.strerror}") from error

    def load(self, identities: Sequence[dict[str, Any]], *, stopped: bool) -> dict[int, Outcome]:
        """Outcomes of those of ``identities`` that are finished, by index.

        Args:
            stopped: whether trials that were stopped early count as finished.

        Raises:
            UsageError: a file is damaged, or all of them belong to other settings (they are named).
        """
        found, stored = {}, None
        for path in self._files():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                stored, outcome = content["identity"], Outcome(**content["outcome"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path} is damaged: delete it, and its trial is run again") from error
            if stored in identities:
                found[identities.index(stored)] = outcome
        if stored is not None and not found:
            changed = [key for key in stored if all(identity.get(key) != stored[key] for identity in identities)]
            values = ", ".join(f"{key} was {stored[key]} and is {identities[0].get(key)}" for key in changed)
            raise UsageError(
                f"--resume: the unfinished sweep had other settings ({values or 'another choice of trials'}): "
                f"repeat them, or delete {self.path}"
            )
        return {
            index: outcome
            for index, outcome in found.items()
            if stopped or outcome.failure is not None or outcome.epochs == identities[index]["epochs"]
        }

    def delete(self) -> None:
        """Forget the trials; called once the best is published."""
        shutil.rmtree(self.path)
