"""What a sweep tried, beside the adapter that it found: ``sweep.json``, ``sweep.md`` and ``sweep.png``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_serve.errors import UsageError
from gpt_serve.files import replacing
from gpt_serve.train.loop import Score
from gpt_serve.train.recipes.recipe import Select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"lr": "learning rate", "gate_init": "gate init", "prompts": "prompts"}
LOGARITHMIC = ("lr", "prompts")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the three files; each is replaced as a whole.

    Args:
        report: what `run_sweep` returns.

    Raises:
        UsageError: the disk refuses.
    """
    writers: dict[str, Callable[[Path], object]] = {
        "sweep.json": lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"),
        "sweep.md": lambda path: path.write_text(report_text(report), encoding="utf-8"),
        "sweep.png": lambda path: plot_sweep(report, path),
    }
    try:
        for name, write in writers.items():
            with replacing(folder / name) as temporary:
                write(temporary)
    except OSError as error:
        raise UsageError(f"the adapter is published, but the sweep's report cannot be written: {error}") from error


def report_table(sweep: dict[str, Any], select: Select) -> tuple[list[str], list[list[str]]]:
    """Header and rows, the best trial first and those that failed last.

    Args:
        sweep: the ``sweep`` of a report.
        select: what trials are ranked by.
    """
    axes = list(sweep["axes"])

    def rank(trial: dict[str, Any]) -> tuple[float, float]:
        return Score(trial["val_accuracy"], trial["val_loss"]).rank(select)

    trials = sorted((trial for trial in sweep["trials"] if trial["status"] != "failed"), key=rank, reverse=True)
    trials += [trial for trial in sweep["trials"] if trial["status"] == "failed"]
    rows = []
    for trial in trials:
        values = [f"{trial[name]:g}" for name in axes]
        if trial["status"] == "failed":
            rows.append([*values, "-", "-", "-", f"{trial['seconds']:.0f}", f"failed: {trial['failure']}"])
            continue
        epoch = f"{trial['best_epoch'] + 1} of {trial['epochs']}"
        accuracy = f"{100 * trial['val_accuracy']:.2f} %"
        rows.append([*values, accuracy, f"{trial['val_loss']:.4f}", epoch, f"{trial['seconds']:.0f}", trial["status"]])
    return [*(NAMES[name] for name in axes), "val accuracy", "val loss", "best epoch", "seconds", "trial"], rows


def report_text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    sweep, metrics = report["sweep"], report["metrics"]
    select: Select = report["recipe"]["select"]
    judged = "accuracy and then loss" if select == "accuracy" else "loss and then accuracy"
    header, rows = report_table(sweep, select)
    best = sweep["trials"][sweep["best"]]
    chosen = ", ".join(f"{NAMES[name]} {best[name]:g}" for name in sweep["axes"])
    splits = (("validation", "val_accuracy"), ("test", "test_accuracy"))  # a final fit has no validation images
    accuracies = [f"{100 * metrics[key]:.2f} % on {what} images" for what, key in splits if key in metrics]
    lines = [
        f"# Sweep of {report['task']}",
        "",
        f"The method `{report['method']}` on `{report['backbone']}`; trials: {len(rows)}, judged by {judged} "
        f"on {report['data']['val']} validation images. The best, {chosen}, was trained and published as revision "
        f"`{report['revision']}`: {', '.join(accuracies)}.",
        "",
        "![validation accuracy of the trials](sweep.png)",
        "",
        *["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]],
        "",
        "## What all trials share",
        "",
        "| | |",
        "|---|---|",
        *[f"| {key} | {value} |" for key, value in sweep["shared"].items() if key not in sweep["axes"]],
        "",
    ]
    return "\n".join(lines)


def plot_sweep(report: dict[str, Any], path: Path) -> None:
    """Validation accuracy by the first axis that varies, a line for each value of the second, a panel of the third.

    Trials that failed are left out; those that were stopped early are hollow; the best one is ringed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    sweep = report["sweep"]
    varying = [name for name, values in sweep["axes"].items() if len(values) > 1] or ["lr"]
    across, lines, panels = (*varying, None, None)[:3]
    columns = sorted(sweep["axes"][panels]) if panels else [None]
    series = sorted(sweep["axes"][lines]) if lines else [None]
    colours = [colormaps["viridis"](0.9 * index / max(1, len(series) - 1)) for index in range(len(series))]
    figure = Figure(figsize=(1.4 + 3.2 * max(len(columns), 1.4), 3.8), layout="constrained")
    figure.suptitle(f"{report['task']}: {report['method']} on {report['backbone']}")
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    best = sweep["trials"][sweep["best"]]
    for axes, column in zip(grid, columns, strict=True):
        trials = [t for t in sweep["trials"] if t["status"] != "failed" and (panels is None or t[panels] == column)]
        for value, colour in zip(series, colours, strict=True):
            line = [trial for trial in trials if lines is None or trial[lines] == value]
            _line(axes, sorted(line, key=lambda trial: float(trial[across])), across, colour, value)
        if best in trials:
            axes.plot(best[across], 100 * best["val_accuracy"], "o", color="crimson", ms=12, mfc="none", mew=1.5)
        if across in LOGARITHMIC and len(sweep["axes"][across]) > 1:
            axes.set_xscale("log")
        values = sorted(sweep["axes"][across])
        axes.set_xticks(values, [f"{tick:g}" for tick in values], rotation=45)
        axes.minorticks_off()
        axes.grid(color="0.92")
        axes.set_xlabel(NAMES[across])
        if panels:
            axes.set_title(f"{NAMES[panels]} {column:g}", fontsize="medium")
    grid[0].set_ylabel("validation accuracy, %")
    if lines:
        figure.legend(*grid[0].get_legend_handles_labels(), title=NAMES[lines], loc="outside right upper")
    figure.savefig(path, dpi=120, format="png")


def _line(axes: "Axes", trials: Sequence[dict[str, Any]], across: str, colour: Any, value: float | None) -> None:
    places = [trial[across] for trial in trials]
    heights = [100 * trial["val_accuracy"] for trial in trials]
    axes.plot(places, heights, color=colour, marker="o", markersize=4, label=None if value is None else f"{value:g}")
    hollow = [index for index, trial in enumerate(trials) if trial["status"] == "stopped"]
    axes.plot([places[i] for i in hollow], [heights[i] for i in hollow], "o", ms=4, color=colour, mfc="white", ls="")
