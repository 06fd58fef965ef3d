"""What a sweep tried, beside the adapter that it found: ``sweep.json``, ``sweep.md`` and ``sweep.png``."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from gpt_serve.errors import UsageError
from gpt_serve.files import replacing
from gpt_serve.train.loop import START, Score
from gpt_serve.train.recipes.recipe import Select
from gpt_serve.train.sweep.trial import Sweep

NAMES = {"lr": "learning rate", "gate_init": "gate init", "prompts": "prompts"}
STATUS = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


def described(sweep: Sweep, trials: Sequence[FrozenTrial], best: int) -> dict[str, Any]:
    """The record of a sweep as plain JSON values; ``best`` is the index of the best trial."""
    settings = [recipe.to_dict() for recipe in sweep.recipes]
    return {
        "early_stop": sweep.early_stop,
        "axes": {name: list(values) for name, values in sweep.axes},
        "shared": {key: value for key, value in settings[0].items() if all(each[key] == value for each in settings)},
        "best": best,
        "trials": [sweep.values(recipe) | came_to(trial) for recipe, trial in zip(sweep.recipes, trials, strict=True)],
    }


def came_to(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial came to, as plain JSON values: of one that failed the reason, of others the best epoch, from 0."""
    failed, stored = trial.state == TrialState.FAIL, trial.user_attrs
    failure = stored.get("failure", "its process died: it may have run out of memory") if failed else None
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    best = {name: None if failed else stored[name] for name in ("best_epoch", "val_accuracy", "val_loss")}
    status = {"status": STATUS[trial.state], "seconds": round(seconds, 1), "epochs": len(trial.intermediate_values)}
    return status | best | {"failure": failure}


def told(trial: dict[str, Any]) -> str:
    """`came_to` in a few words."""
    if trial["status"] == "failed":
        return f"failed: {trial['failure']}"
    epoch = _epoch(trial)
    when = epoch if trial["best_epoch"] == START else f"epoch {epoch}"
    return f"val {100 * trial['val_accuracy']:.1f} % ({when}), {trial['seconds']:.0f} s"


def _epoch(trial: dict[str, Any]) -> str:
    """Which epoch a trial was best in, counted from 1."""
    return "before any epoch" if trial["best_epoch"] == START else f"{trial['best_epoch'] + 1} of {trial['epochs']}"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the three files of what `run_sweep` returns; each is replaced as a whole.

    Raises:
        UsageError: the disk refuses.
    """
    try:
        for name, text in (("sweep.json", json.dumps(report, indent=1) + "\n"), ("sweep.md", report_text(report))):
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        with replacing(folder / "sweep.png") as temporary:
            plot_sweep(report, temporary)
    except OSError as error:
        raise UsageError(f"the adapter is published, but the sweep's report cannot be written: {error}") from error


def score(trial: dict[str, Any], select: Select) -> tuple[float, ...]:
    """What trials are ranked by, the larger, the better; one that failed is the last of all."""
    failed = trial["status"] == "failed"
    return (-math.inf,) if failed else Score(trial["val_accuracy"], trial["val_loss"]).rank(select)


def report_table(sweep: dict[str, Any], select: Select) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the ``sweep`` of a report, the best trial by ``select`` first and those that failed last."""
    rows = []
    for trial in sorted(sweep["trials"], key=lambda trial: score(trial, select), reverse=True):
        measured = ["-", "-", "-"]
        if trial["status"] != "failed":
            measured = [f"{100 * trial['val_accuracy']:.2f} %", f"{trial['val_loss']:.4f}", _epoch(trial)]
        ending = trial["status"] + (f": {trial['failure']}" if trial["failure"] else "")
        rows.append([*(f"{trial[name]:g}" for name in sweep["axes"]), *measured, f"{trial['seconds']:.0f}", ending])
    return [
        *(NAMES[name] for name in sweep["axes"]),
        "val accuracy",
        "val loss",
        "best epoch",
        "seconds",
        "trial",
    ], rows


def report_text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    sweep, metrics, select = report["sweep"], report["metrics"], report["recipe"]["select"]
    header, rows = report_table(sweep, select)
    chosen = ", ".join(f"{NAMES[name]} {sweep['trials'][sweep['best']][name]:g}" for name in sweep["axes"])
    splits = (("validation", "val_accuracy"), ("test", "test_accuracy"))  # a final fit has no validation images
    accuracies = [f"{100 * metrics[key]:.2f} % on {what} images" for what, key in splits if key in metrics]
    shared = [[key, str(value)] for key, value in sweep["shared"].items() if key not in sweep["axes"]]
    return f"""# Sweep of {report["task"]}

The method `{report["method"]}` on `{report["backbone"]}`: {len(rows)} trials, judged by {select} on
{report["data"]["val"]} validation images. The best, {chosen}, was trained and published as revision
`{report["revision"]}`: {", ".join(accuracies)}.

![validation accuracy of the trials](sweep.png)

{_table(header, rows)}

## What all trials share

{_table(["", ""], shared)}
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def plot_sweep(report: dict[str, Any], path: Path) -> None:
    """Plot validation accuracy over each field that varies, a panel for each, as a PNG.

    Trials that failed are left out; those that were stopped early are hollow; the best one is ringed.
    """
    from matplotlib.figure import Figure

    sweep = report["sweep"]
    varying = [name for name, values in sweep["axes"].items() if len(values) > 1] or ["lr"]
    figure = Figure(figsize=(1.4 + 3.2 * len(varying), 3.8), layout="constrained")
    figure.suptitle(f"{report['task']}: {report['method']} on {report['backbone']}")
    best, trials = sweep["trials"][sweep["best"]], [t for t in sweep["trials"] if t["status"] != "failed"]
    for axes, name in zip(figure.subplots(1, len(varying), sharey=True, squeeze=False)[0], varying, strict=True):
        for status, colour in (("finished", "C0"), ("stopped", "none")):
            points = [(trial[name], 100 * trial["val_accuracy"]) for trial in trials if trial["status"] == status]
            axes.scatter(*zip(*points, strict=True) if points else ([], []), s=18, facecolors=colour, edgecolors="C0")
        axes.scatter(best[name], 100 * best["val_accuracy"], s=140, facecolors="none", edgecolors="crimson")
        if name != "gate_init":
            axes.set_xscale("log")
        ticks = sorted(sweep["axes"][name])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45)
        axes.minorticks_off()
        axes.set(xlabel=NAMES[name], ylabel="validation accuracy, %" if name == varying[0] else "")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120, format="png")
