"""What the processes of a sweep run: the next trial of its study, and at the end the best one as `train` would."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from gpt_serve.errors import DataError, GPTServeError, UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.checkpoint import RunCheckpoint, run_folder
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import new_trainer, prepare, run_identity, train_on
from gpt_serve.train.job import Reporter, Silent, TrainingJob, Views
from gpt_serve.train.loading import BackboneFacts, LoadArguments, load_backbone
from gpt_serve.train.recipes.recipe import Recipe
from gpt_serve.train.workers import unshared

SPACE = {  # what recipes take, for Optuna's plots: nothing is drawn from it
    "lr": FloatDistribution(1e-300, 1e4, log=True),
    "gate_init": FloatDistribution(-100, 100),
    "prompts": IntDistribution(1, 4096, log=True),
}
REDUCTION = 3  # of the trials that come so far, one in so many goes on


@dataclass(frozen=True)
class Sweep:
    """What to try; all processes get the same.

    Attributes:
        job: what to train and where to put it, by absolute paths; ``resume`` continues an interrupted sweep.
        backbone: how it is loaded.
        facts: what is known of it.
        axes: the fields of a recipe that vary, with their values.
        recipes: the trials, points of the grid.
        early_stop: whether hopeless trials are stopped before their last epoch (ASHA).
        jobs: trials at a time; None for as many as fit.
    """

    job: TrainingJob
    backbone: LoadArguments
    facts: BackboneFacts
    axes: tuple[tuple[str, Sequence[float]], ...]
    recipes: tuple[Recipe, ...]
    early_stop: bool = False
    jobs: int | None = None

    @property
    def journal(self) -> Path:
        """The file of its study."""
        return run_folder(self.job.adapters, self.job.task) / "sweep.jsonl"

    def identity(self, recipe: Recipe, digest: str) -> dict[str, Any]:
        """What tells a trial from all others, as plain JSON values; ``digest`` is the images'."""
        return run_identity(self.facts.spec, replace(self.job, recipe=recipe), digest)

    def values(self, recipe: Recipe) -> dict[str, float]:
        """The fields of ``recipe`` that vary."""
        return {name: getattr(recipe, name) for name, _ in self.axes}


def open_study(sweep: Sweep) -> optuna.Study:
    """The study that all processes share.

    Raises:
        UsageError: its journal cannot be made here, or is damaged.
    """
    epochs, warmup = sweep.recipes[0].epochs, sweep.recipes[0].warmup
    grace = min(epochs, warmup + max(1, (epochs - warmup) // REDUCTION**2))  # in warm-up all trials are alike
    pruner = SuccessiveHalvingPruner(min_resource=grace, reduction_factor=REDUCTION)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(sweep.journal))),
            sampler=optuna.samplers.RandomSampler(),
            pruner=pruner if sweep.early_stop else NopPruner(),
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
        )
    except OSError as error:
        raise UsageError(f"{sweep.journal} cannot be opened on every machine: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{sweep.journal} is damaged: delete it, and its trials are run again") from error


def run_trial(sweep: Sweep) -> int:
    """Run the trial that waits longest; returns its number.

    The study then holds what it came to: ``val_accuracy``, ``val_loss`` and ``best_epoch``, or ``failure``.
    """
    if not sweep.journal.is_file():
        raise unshared(sweep.job.adapters)
    study = open_study(sweep)
    trial = study.ask({name: SPACE[name] for name, _ in sweep.axes})
    try:
        study.tell(trial, _train(sweep, trial))
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except Exception as error:  # whatever goes wrong is this trial's alone
        reason = str(error) if isinstance(error, GPTServeError) else f"{type(error).__name__}: {error}"
        trial.set_user_attr("failure", " ".join(reason.split()))
        study.tell(trial, state=TrialState.FAIL)
    return trial.number


def _train(sweep: Sweep, trial: optuna.Trial) -> float:
    """The score of the trial's best epoch; the larger, the better."""
    recipe = sweep.recipes[trial.user_attrs["index"]]
    backbone, views = _open(sweep)
    if run_identity(backbone.spec, replace(sweep.job, recipe=recipe), views.digest) != trial.user_attrs["identity"]:
        raise DataError("images or weights on this machine are not those of the machine that runs the sweep")
    trainer = new_trainer(backbone, replace(sweep.job, recipe=recipe, resume=False), views, Silent(), World())

    def after_epoch(_: object) -> None:
        best = trainer.progress.best_record
        if not math.isfinite(best.val_loss):
            raise DataError(f"the validation loss is not finite in epoch {best.epoch}: lower --lr")
        for name in ("val_accuracy", "val_loss"):
            trial.set_user_attr(name, getattr(best, name))
        trial.set_user_attr("best_epoch", best.epoch)
        trial.report(best.val.rank(recipe.select)[0], trainer.progress.epoch)
        if trainer.progress.epoch < recipe.epochs and trial.should_prune():
            raise optuna.TrialPruned

    return trainer.fit(Silent().batch, after_epoch).best_record.val.rank(recipe.select)[0]


def train_best(sweep: Sweep, recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    """Train and publish as `train_adapter` does; an interrupted training of the very same recipe goes on.

    Returns:
        The summary of `train_adapter`.
    """
    started = time.perf_counter()
    backbone, views = _open(sweep)
    again = RunCheckpoint(sweep.job.adapters, sweep.job.task).holds(sweep.identity(recipe, views.digest))
    job = replace(sweep.job, recipe=recipe, resume=again)
    summary = train_on(backbone, views, job, reporter, World(), started)
    assert summary is not None  # a world of one process has no followers
    return summary


@lru_cache(maxsize=1)
def _open(sweep: Sweep) -> tuple[Backbone, Views]:
    """Backbone and images, once for all trials of a process."""
    backbone = load_backbone(sweep.backbone)
    return backbone, prepare(backbone, replace(sweep.job, recipe=sweep.recipes[0]), Silent())
