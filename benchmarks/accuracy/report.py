"""Tables and plots of the accuracy study."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from plan import (
    ABLATIONS,
    BY_NAME,
    FOLDERS,
    ON_THE_WAY,
    SEARCHED_ON,
    SEEDS,
    VARIANTS,
    Ablation,
    Run,
    Variant,
    selects_by_loss,
)

if TYPE_CHECKING:
    from study import Study

MISSING = "not run"


def write_report(study: "Study", folder: Path) -> None:
    """Write ``tables.md`` and the plots from the runs that are there."""
    lines = ["# Accuracy study", "", *method_table(study, VARIANTS), "", "Tried on the way, one seed:", ""]
    lines += [*method_table(study, ON_THE_WAY), "", *rate_table(study)]
    for ablation in ABLATIONS:
        found = ablation_results(study, ablation)
        if found:
            lines += ["", f"## {ablation.title}", "", *ablation_table(ablation, found)]
            plot_ablation(ablation, found, folder / f"{ablation.name}.png")
    lines += nmi_table(study)
    (folder / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_methods(study, folder / "methods.png")
    print("\n".join(lines))


def accuracies(study: "Study", runs: Sequence[Run]) -> list[float]:
    """Test accuracies in per cent of the first runs, up to one that is missing."""
    found = takewhile(lambda summary: summary is not None, map(study.result, runs))
    return [100 * summary["metrics"]["test_accuracy"] for summary in found if summary is not None]


def spread(values: Sequence[float], wanted: int) -> str:
    """Mean and standard deviation, and how many there are when some are missing."""
    if not values:
        return MISSING
    text = f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
    return text if len(values) == wanted else f"{text} ({len(values)} of {wanted} seeds)"


def of_method(study: "Study", variant: Variant) -> dict[str, list[float]]:
    """Accuracies by task, a seed each."""
    lr = study.rate(variant)
    if lr is None:
        return {task: [] for task in variant.tasks}
    return {task: accuracies(study, [Run(variant, task, lr, seed) for seed in variant.seeds]) for task in variant.tasks}


def method_table(study: "Study", variants: Sequence[Variant]) -> list[str]:
    """Mean and standard deviation over seeds."""
    tasks = variants[0].tasks
    header = ["method", *tasks, "mean", "parameters", "lr"]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---|" * (len(header) - 1)]
    for variant in variants:
        by_task, lr = of_method(study, variant), study.rate(variant)
        over_tasks = [mean(values) for values in zip(*by_task.values(), strict=False)]
        summary = None if lr is None else study.result(Run(variant, SEARCHED_ON, lr, SEEDS[0]))
        cells = [spread(values, len(variant.seeds)) for values in [*by_task.values(), over_tasks]]
        cells[-1] = f"**{cells[-1]}**"
        cells.append(MISSING if summary is None else f"{summary['trainable_parameters']:,}")
        cells.append(MISSING if lr is None else f"{lr:g}")
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    return lines


def rate_table(study: "Study") -> list[str]:
    """What the learning rates were chosen by."""
    lines = [
        f"## Learning rates, by validation accuracy (%) on {SEARCHED_ON}; with a head from LDA, by validation loss",
        *("", "| method | rates |", "|---|---|"),
    ]
    for variant in BY_NAME.values():
        cells = []
        for lr in variant.rates:
            summary = study.result(Run(variant, SEARCHED_ON, lr, SEEDS[0]))
            shown = MISSING if summary is None else _score(summary)
            cells.append(f"{lr:g}: {shown}")
        lines.append(f"| {variant.name} | {'; '.join(cells)} |")
    return lines


def _score(summary: dict[str, Any]) -> str:
    metrics = summary["metrics"]
    by_loss = selects_by_loss(summary)
    return f"{metrics['val_loss']:.3f}" if by_loss else f"{100 * metrics['val_accuracy']:.1f}"


def nmi_table(study: "Study") -> list[str]:
    """Mutual information between prompts and patch tokens, mean of the blocks, after the first and the last epoch."""
    rows = []
    for name, run in study.nmi().items():
        summary = study.result(run)
        if summary is not None:
            first, last = (mean(summary["nmi"][epoch]) for epoch in (0, -1))
            rows.append(f"| {name} | {first:.3f} | {last:.3f} |")
    title = (
        f"## Normalised mutual information between prompts and patch tokens, mean of the blocks, {SEARCHED_ON} (SPT)"
    )
    return ["", title, "", "| method | first epoch | last epoch |", "|---|---|---|", *rows] if rows else []


def ablation_results(study: "Study", ablation: Ablation) -> dict[str, dict[str, list[float]]]:
    """Accuracies by setting and task, of those that are complete."""
    results = {}
    for label, runs in study.ablation(ablation).items():
        by_task = {task: accuracies(study, [run for run in runs if run.task == task]) for task in ablation.tasks}
        if all(by_task.values()):
            results[label] = by_task
    return results


def ablation_table(ablation: Ablation, found: dict[str, dict[str, list[float]]]) -> list[str]:
    lines = [f"| | {' | '.join(ablation.tasks)} |", "|---|" + "---|" * len(ablation.tasks)]
    seeds = len(ablation.seeds)
    for label, by_task in found.items():
        lines.append(f"| {label} | {' | '.join(spread(by_task[task], seeds) for task in ablation.tasks)} |")
    return lines


def plot_ablation(ablation: Ablation, found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Points with error bars, a series for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 * max(5, len(found)), 3.4), layout="constrained")
    axes = figure.subplots()
    for task in ablation.tasks:
        values = [by_task[task] for by_task in found.values()]
        errors = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        axes.errorbar(list(found), [mean(each) for each in values], errors, fmt="o", capsize=3, label=task)
    axes.set(title=ablation.title, ylabel="test accuracy, %")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    figure.savefig(path, dpi=110)


def plot_methods(study: "Study", path: Path) -> None:
    """A panel for each task, a bar for each method, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(FOLDERS), sharey=True), FOLDERS, strict=True):
        shown = [(variant.name, of_method(study, variant)[task]) for variant in reversed(VARIANTS)]
        done = [(name, values) for name, values in shown if values]
        axes.barh([name for name, _ in done], [mean(values) for _, values in done], color="0.8")
        for name, values in done:
            axes.plot(values, [name] * len(values), "o", markersize=3, color="C0")
        low = min((min(values) for _, values in done), default=0.0)
        axes.set(title=task, xlabel="test accuracy, %", xlim=(max(0.0, low - 5), None))
    figure.savefig(path, dpi=110)
