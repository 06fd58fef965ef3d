"""Search the hyperparameters of one task: validation images judge the trials, the best one is trained and published.

What is tried is fixed before anything trains; how trials are run (`sweep_ray`) is the caller's choice.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from gpt_serve.errors import DataError, UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import check_task_name
from gpt_serve.train.checkpoint import RunCheckpoint, held, run_folder
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import prepare, run_identity, train_in_folder
from gpt_serve.train.job import Job, Reporter
from gpt_serve.train.methods.prompts import find_method
from gpt_serve.train.recipes.paper_table import selected_values
from gpt_serve.train.recipes.recipe import Recipe
from gpt_serve.train.sweep.report import write_report
from gpt_serve.train.sweep.trial import BackboneSource, Work
from gpt_serve.train.sweep.trials import Outcome, Trial, TrialStore, best_trial

# Yoo et al., Appendix A.2: the rates that were searched with SGD.
PAPER_RATES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# AdamW's steps do not shrink with the gradient: the same grid, a hundredth of it.
ADAMW_RATES = tuple(rate / 100 for rate in PAPER_RATES)
# Of prompts, gates and temperatures alone, beside a head that has a small rate of its own.
LDA_RATES = tuple(rate / 10 for rate in PAPER_RATES)

Axes = Mapping[str, Sequence[float]]  # field of a recipe -> its values


class Runner(Protocol):
    """Trains recipes, several at a time perhaps."""

    def __call__(
        self, work: Work, recipes: Sequence[Recipe], finished: Callable[[int, Outcome], object]
    ) -> dict[int, str]:
        """Run `run_trial` for each recipe and call ``finished`` with its index when it ends.

        Returns:
            Reasons of the trials, by index, that crashed without an outcome.
        """


class SweepReporter(Reporter, Protocol):
    """Where progress goes."""

    def trials(self, total: int, done: int) -> Callable[[], object]:
        """So many trials, of which some are done already; call the result after each of the others."""


def make_axes(recipe: Recipe, given: Mapping[str, Sequence[float] | None]) -> dict[str, list[float]]:
    """The values of learning rate, gate prior and number of prompts; the paper's where none are given.

    The paper names the rates that it searched; of gate priors and prompts its Table 5 shows those that were selected.

    Raises:
        UsageError: values are given for what the method does not learn.
    """
    method = find_method(recipe.method)
    adaptive = LDA_RATES if recipe.head_init == "lda" and method.prompts else ADAMW_RATES
    defaults: dict[str, Sequence[float]] = {"lr": adaptive if recipe.optimizer == "adamw" else PAPER_RATES}
    if method.gated:
        defaults["gate_init"] = selected_values("gate_init")
    if method.prompts:
        defaults["prompts"] = selected_values("prompts")
    for name, values in given.items():
        if values is not None and name not in defaults:
            what = "gates" if name == "gate_init" else "prompts"
            raise UsageError(f"--{name.replace('_', '-')}: the method {recipe.method} learns no {what}: leave it out")
    return {name: list(dict.fromkeys(given.get(name) or values)) for name, values in defaults.items()}


def make_grid(at_rate: Callable[[float], Recipe], axes: Axes, samples: int | None = None) -> list[Recipe]:
    """A recipe for every point of the grid, or for ``samples`` of them, drawn by the seed; in the grid's order.

    Trials keep validation images apart, whatever a final fit does with them afterwards.

    Args:
        at_rate: the recipe at a learning rate, other axes aside.

    Raises:
        UsageError: a value that no recipe can have.
    """
    points = list(product(*axes.values()))
    if samples is not None and samples < len(points):
        chosen = random.Random(at_rate(axes["lr"][0]).seed).sample(range(len(points)), samples)
        points = [points[index] for index in sorted(chosen)]
    settings: list[dict[str, Any]] = [dict(zip(axes, point, strict=True)) for point in points]
    return [replace(at_rate(setting["lr"]), final_fit=False, **setting) for setting in settings]


@dataclass(frozen=True)
class Sweep:
    """What to try.

    Attributes:
        job: what to train and where to put it; ``resume`` continues an interrupted sweep.
        axes: values of the fields that vary.
        recipes: the trials, points of the grid.
        early_stop: whether hopeless trials are stopped before their last epoch.
    """

    job: Job
    axes: Axes
    recipes: Sequence[Recipe]
    early_stop: bool = False


def run_sweep(
    backbone: Backbone, source: BackboneSource, sweep: Sweep, runner: Runner, reporter: SweepReporter
) -> dict[str, Any]:
    """Run the trials, then train and publish the best recipe as `train_adapter` does, and write the report beside it.

    Trials see training and validation images only.

    Returns:
        The summary of `train_adapter`, and ``sweep``: axes and trials.

    Raises:
        GPTServeError: settings or data that cannot work, an unfinished sweep in the way, or no trial that succeeded.
        KeyboardInterrupt: interrupted; finished trials are stored for ``resume``.
    """
    check_task_name(sweep.job.task)
    with held(run_folder(sweep.job.adapters, sweep.job.task)):
        return _sweep_in_folder(backbone, source, sweep, runner, reporter)


def _sweep_in_folder(
    backbone: Backbone, source: BackboneSource, sweep: Sweep, runner: Runner, reporter: SweepReporter
) -> dict[str, Any]:
    job = sweep.job
    store = TrialStore(job.adapters, job.task)
    store.check(resume=job.resume)
    digest = prepare(backbone, job, reporter)[1].digest
    identities = [run_identity(backbone, replace(job, recipe=recipe), digest) for recipe in sweep.recipes]
    known = store.load(identities, stopped=sweep.early_stop)
    checkpoint = RunCheckpoint(job.adapters, job.task)
    work = Work(source, _anywhere(job), backbone.device.type, backbone.fingerprint, digest)
    store.prepare()
    try:
        trials = _run(sweep, work, known, identities, store, runner, reporter)
        best = best_trial(trials)
        if best is None:
            store.delete()
            raise DataError(f"all {len(trials)} trials failed; the first: {trials[0].outcome.failure}")
        reporter.notice(f"best: {describe(best.recipe, sweep.axes)}; training it")
        winner = replace(job, recipe=replace(best.recipe, final_fit=job.recipe.final_fit))
        # With all trials known, it may be this training that was interrupted.
        again = len(known) == len(trials) and checkpoint.holds(run_identity(backbone, winner, digest))
        summary = train_in_folder(backbone, replace(winner, resume=again), reporter, World())
    except KeyboardInterrupt:
        reporter.notice(f"{store.count()} of {len(identities)} trials are done: add --resume to continue")
        raise
    assert summary is not None  # a world of one process has no followers
    report = summary | {"sweep": {"early_stop": sweep.early_stop, **_tried(sweep.axes, trials, best)}}
    write_report(job.adapters / job.task, report)
    store.delete()
    return report


def _run(
    sweep: Sweep,
    work: Work,
    known: dict[int, Outcome],
    identities: list[dict[str, Any]],
    store: TrialStore,
    runner: Runner,
    reporter: SweepReporter,
) -> list[Trial]:
    """The outcome of every trial, in the grid's order; each is stored as soon as it is known."""
    outcomes, total = dict(known), len(sweep.recipes)
    pending = [index for index in range(total) if index not in known]
    if known:
        reporter.notice(f"resuming after {len(known)} of {total} trials")
    tick = reporter.trials(total, len(known))

    def finished(position: int, outcome: Outcome) -> None:
        index = pending[position]
        outcomes[index] = outcome
        store.save(identities[index], outcome)
        tick()
        reporter.notice(f"trial {len(outcomes)} of {total}: {describe(sweep.recipes[index], sweep.axes)}: {outcome}")

    if pending:
        crashed = runner(work, [sweep.recipes[index] for index in pending], finished)
        outcomes |= {pending[position]: Outcome(failure=reason) for position, reason in crashed.items()}
    return [Trial(sweep.recipes[index], outcomes[index]) for index in range(total)]


def _anywhere(job: Job) -> Job:
    """The same images, whatever the working folder."""
    folder = Path(job.data)
    return replace(job, data=str(folder.resolve()) if folder.exists() else job.data, resume=False)


def describe(recipe: Recipe, axes: Axes) -> str:
    """The fields that vary, with their values."""
    return ", ".join(f"{name.replace('_', ' ')} {getattr(recipe, name):g}" for name in axes)


def _tried(axes: Axes, trials: Sequence[Trial], best: Trial) -> dict[str, Any]:
    """Axes, what all trials share and the trials, as plain JSON values."""
    recipes = [trial.recipe.to_dict() for trial in trials]
    return {
        "axes": {name: list(values) for name, values in axes.items()},
        "shared": {key: value for key, value in recipes[0].items() if all(r[key] == value for r in recipes)},
        "best": trials.index(best),
        "trials": [
            {name: getattr(trial.recipe, name) for name in axes} | trial.outcome.to_dict(trial.recipe.epochs)
            for trial in trials
        ],
    }
