"""Search the hyperparameters of one task: validation images judge the trials, the best one is trained and published.

The trials are fixed before anything trains. They are those of an Optuna study, whose journal lies with the task's
unfinished runs. This process loads no backbone: all that needs one runs in `workers`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from itertools import product
from typing import Any, Protocol

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from gpt_serve.errors import DataError, GPTServeError, UsageError
from gpt_serve.specs import check_task_name
from gpt_serve.train.checkpoint import held, run_folder
from gpt_serve.train.fit import load_views, open_data
from gpt_serve.train.job import Reporter
from gpt_serve.train.methods.prompts import find_method
from gpt_serve.train.recipes.paper_table import selected_values
from gpt_serve.train.recipes.recipe import Recipe
from gpt_serve.train.sweep.report import came_to, described, score, told, write_report
from gpt_serve.train.sweep.trial import Sweep, open_study, run_trial, train_best
from gpt_serve.train.workers import Workers

# Yoo et al., Appendix A.2: the rates that were searched with SGD.
PAPER_RATES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# AdamW's steps do not shrink with the gradient: the same grid, a hundredth of it.
ADAMW_RATES = tuple(rate / 100 for rate in PAPER_RATES)
# Of prompts, gates and temperatures alone, beside a head that has a small rate of its own.
LDA_RATES = tuple(rate / 10 for rate in PAPER_RATES)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class SweepReporter(Reporter, Protocol):
    """A `Reporter` that also counts trials."""

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


def make_grid(
    at_rate: Callable[[float], Recipe], axes: Mapping[str, Sequence[float]], samples: int | None = None
) -> list[Recipe]:
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


def run_sweep(sweep: Sweep, workers: Workers, reporter: SweepReporter) -> dict[str, Any]:
    """Run the trials, then train and publish the best recipe as `train_adapter` does, and write the report beside it.

    Trials see training and validation images only.

    Returns:
        The summary of `train_adapter`, and ``sweep``: axes and trials.

    Raises:
        GPTServeError: settings or data that cannot work, an unfinished sweep in the way, or no trial that succeeded.
        KeyboardInterrupt: interrupted; finished trials are stored for ``resume``.
    """
    job, journal = sweep.job, sweep.journal
    if job.resume and not journal.is_file():
        raise UsageError(f"nothing to resume: {journal} does not exist; sweep without --resume")
    with held(run_folder(job.adapters, check_task_name(job.task))):
        if journal.is_file() and not job.resume:
            raise UsageError(f"{journal} holds an unfinished sweep: add --resume to continue it, or delete the file")
        preprocess, dataset = open_data(sweep.facts.spec, job)
        digest = load_views(dataset, preprocess, job, reporter).digest
        study = open_study(sweep)
        try:
            trials = _run(sweep, digest, study, workers, reporter)
            best = _best(sweep, trials)
            reporter.notice(f"best: {shown(sweep.values(sweep.recipes[best]))}; training it")
            winner = replace(sweep.recipes[best], final_fit=job.recipe.final_fit)
            with workers(1) as submit:
                summary: dict[str, Any] = submit(train_best, sweep, winner, reporter).result()
            report = summary | {"sweep": described(sweep, trials, best)}
            write_report(job.adapters / job.task, report)
        except KeyboardInterrupt:
            done = len(_in(study, *FINISHED))
            reporter.notice(f"{done} of {len(sweep.recipes)} trials are done: add --resume to continue")
            raise
        except OSError as error:
            raise UsageError(f"the trials cannot be written to {journal}: {error.strerror}") from error
        finally:
            if not _in(study, *FINISHED):  # nothing is lost by it
                journal.unlink()
        journal.unlink()
        return report


def _run(sweep: Sweep, digest: str, study: Study, workers: Workers, reporter: SweepReporter) -> list[FrozenTrial]:
    """Run the trials that are not finished; returns all of them, in the grid's order."""
    total, identities = len(sweep.recipes), [sweep.identity(recipe, digest) for recipe in sweep.recipes]
    ended = _finished(sweep, study, identities)
    if ended:
        reporter.notice(f"resuming after {len(ended)} of {total} trials")
    tick = reporter.trials(total, len(ended))
    for index in sorted(set(range(total)) - set(ended)):
        study.enqueue_trial(sweep.values(sweep.recipes[index]), {"index": index, "identity": identities[index]})

    def end(trial: FrozenTrial) -> None:
        ended[trial.user_attrs["index"]] = trial
        tick()
        reporter.notice(f"trial {len(ended)} of {total}: {shown(trial.params)}: {told(came_to(trial))}")

    while waiting := _in(study, TrialState.WAITING):
        with workers(sweep.jobs) as submit:
            for future in as_completed([submit(run_trial, sweep) for _ in waiting]):
                error = future.exception()
                if isinstance(error, GPTServeError):
                    raise error
                if error is None:  # else its process died, and may have taken those beside it along
                    end(study.trials[future.result()])
        for trial in _fail(study, TrialState.RUNNING):
            end(trial)
        if len(_in(study, TrialState.WAITING)) == len(waiting):
            raise UsageError(f"no process could begin a trial: {error}")
    return [ended[index] for index in range(total)]


def _finished(sweep: Sweep, study: Study, identities: Sequence[dict[str, Any]]) -> dict[int, FrozenTrial]:
    """The finished trials of an interrupted sweep, by index.

    Those that failed are run again, and so are those that were stopped early where none are to be.

    Raises:
        UsageError: all belong to other settings (they are named).
    """
    for state in (TrialState.WAITING, TrialState.RUNNING):  # nobody runs them any more
        _fail(study, state)
    found = _in(study, *FINISHED[: 1 + sweep.early_stop])
    known = {identities.index(each): trial for trial in found if (each := trial.user_attrs["identity"]) in identities}
    if found and not known:
        stored = found[-1].user_attrs["identity"]
        changed = [key for key in stored if all(identity.get(key) != stored[key] for identity in identities)]
        values = ", ".join(f"{key} was {stored[key]} and is {identities[0].get(key)}" for key in changed)
        raise UsageError(
            f"--resume: the unfinished sweep had other settings ({values or 'another choice of trials'}): "
            f"repeat them, or delete {sweep.journal}"
        )
    return known


def _in(study: Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _fail(study: Study, state: TrialState) -> list[FrozenTrial]:
    """Give up the trials in ``state``; returns them."""
    numbers = [trial.number for trial in _in(study, state)]
    for number in numbers:
        study.tell(study.ask() if state == TrialState.WAITING else number, state=TrialState.FAIL)
    return [study.trials[number] for number in numbers]


def _best(sweep: Sweep, trials: Sequence[FrozenTrial]) -> int:
    """By the validation score that recipes select epochs by, then by the grid's order."""
    outcomes, select = [came_to(trial) for trial in trials], sweep.recipes[0].select
    if all(outcome["failure"] for outcome in outcomes):
        raise DataError(f"all {len(trials)} trials failed; the first: {outcomes[0]['failure']}")
    return max(range(len(trials)), key=lambda index: score(outcomes[index], select))


def shown(values: Mapping[str, float]) -> str:
    """The fields that vary, for people."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())
