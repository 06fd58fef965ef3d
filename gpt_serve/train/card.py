"""The model card beside an adapter: a README and plots, for people; the server never reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.files import replacing
from gpt_serve.insight.figures import save_figure
from gpt_serve.insight.inspect import Inspection, inspect_adapter, plot_inspection
from gpt_serve.train.answers import Answers
from gpt_serve.train.calibration import BINS
from gpt_serve.train.conclusion import Conclusion
from gpt_serve.train.report import data_report, report

MOST_CLASSES = 120  # in a picture; more could not be told apart, and their matrix takes gigabytes


def most_confused(predictions: Tensor, targets: Tensor, classes: int, most: int) -> Tensor:
    """The ``most`` classes that take part in the most mistakes, as the true or as the predicted one.

    Args:
        predictions: int64 (n,).
        targets: int64 (n,).
        classes: ``C``.

    Returns:
        int64 (min(C, most),), in order.
    """
    wrong = predictions != targets
    mistakes = sum(torch.bincount(of[wrong], minlength=classes) for of in (predictions, targets))
    assert isinstance(mistakes, Tensor)
    return mistakes.argsort(descending=True, stable=True)[:most].sort().values


def confusion_shares(predictions: Tensor, targets: Tensor, classes: int, shown: Tensor) -> Tensor:
    """float64 (S, S): of all images of the true class ``shown[row]``, the share predicted as ``shown[column]``."""
    place = torch.full((classes,), -1).index_put((shown,), torch.arange(len(shown)))
    rows, columns = place[targets], place[predictions]
    both = (rows >= 0) & (columns >= 0)
    counts = torch.bincount(rows[both] * len(shown) + columns[both], minlength=len(shown) ** 2)
    images = torch.bincount(targets, minlength=classes)[shown].clamp(min=1)
    return counts.view(len(shown), len(shown)).double() / images[:, None]


def write_card(folder: Path, adapter: Adapter, revision: str, end: Conclusion) -> None:
    """Write ``README.md``, ``gates.png`` and ``confusion.png`` into the adapter's folder, each as a whole.

    Of a task with several labels an image there is no confusion to draw.

    Args:
        end: what training came to.

    Raises:
        OSError: the disk refuses.
    """
    inspection, answers = inspect_adapter(adapter), end.answers
    plot_inspection(inspection, f"{adapter.task} ({adapter.method})", folder / "gates.png")
    if isinstance(answers, Answers):
        title = f"{adapter.task}: {end.split} images"
        plot_confusion(answers.predictions, answers.targets, adapter.labels, title, folder / "confusion.png")
    found = report(answers, adapter.labels, end.split, adapter.threshold) + data_report(
        end.duplicates, end.label_errors
    )
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card_text(adapter, revision, inspection, end.split, found), encoding="utf-8")


def plot_confusion(predictions: Tensor, targets: Tensor, labels: Sequence[str], title: str, path: Path) -> None:
    """Write a confusion matrix, normalised by row, as a PNG: of the most confused classes if there are many."""
    from matplotlib.figure import Figure

    shown = most_confused(predictions, targets, len(labels), MOST_CLASSES)
    if len(shown) < len(labels):
        title += f", the {len(shown)} of {len(labels)} classes with the most mistakes"
    side = min(14.0, max(4.5, 0.35 * len(shown) + 2))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(confusion_shares(predictions, targets, len(labels), shown).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title)
    lacking = _not_drawable(labels)
    names = [f"#{number}" if labels[number] in lacking else _plain(labels[number]) for number in shown.tolist()]
    axes.set_xlabel("predicted (#: number of a class, from 0)" if lacking else "predicted")
    axes.set_ylabel("true")
    size = 8 if len(shown) <= 30 else 4
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(shown)), names, fontsize=size)
    save_figure(figure, path, dpi=120)


def _not_drawable(labels: Sequence[str]) -> set[str]:
    """Labels with a character that matplotlib's font lacks: it would draw boxes, and warn of each."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    characters = get_font(findfont(FontProperties())).get_charmap()
    return {label for label in labels if not all(ord(character) in characters for character in label)}


def _plain(label: str) -> str:
    """Labels are folder names: matplotlib must not read mathematics into them."""
    return label.replace("$", r"\$")


def card_text(adapter: Adapter, revision: str, inspection: Inspection, split: str, found: Sequence[str] = ()) -> str:
    """The model card in Markdown.

    Args:
        found: lines about the classes and images.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: ``adapter.training`` is not what `train_adapter` records.
    """
    training = adapter.training
    lines = [
        f"# {adapter.task}",
        "",
        f"An adapter for the frozen backbone `{adapter.backbone}`, {len(adapter.labels)} classes, "
        f"trained with the method `{adapter.method}`.",
        "",
        *fact_lines(adapter, revision),
        "![gates, temperatures and selection ratio](gates.png)"
        + (f" ![confusion matrix on {split}](confusion.png)" if adapter.threshold is None else ""),
        "",
        "## Blocks",
        "",
        *block_table(inspection),
        "",
        *[line for step in training.get("closing", []) for line in _closing(step)],
        *_calibration(training.get("calibration")),
        *found,
        *training_lines(training),
    ]
    return "\n".join(lines)


def fact_lines(adapter: Adapter, revision: str) -> list[str]:
    """The card's first table: what the adapter is, and how good."""
    training = adapter.training
    return [
        "| | |",
        "|---|---|",
        f"| revision | `{revision}` |",
        f"| created | {adapter.created} |",
        f"| backbone | `{adapter.backbone}` (`{adapter.backbone_sha256[:12]}`) |",
        f"| prompts | {adapter.prompts}{' per block' if adapter.deep else ''}{_entry(adapter.first_block)} |",
        f"| trainable parameters | {training['trainable_parameters']:,} |",
        *[f"| {name} | {value} |" for name, value in metric_rows(training["metrics"])],
        "",
    ]


def training_lines(training: dict[str, Any]) -> list[str]:
    """The card's last section: recipe and data."""
    return [
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *[f"| {key} | {value} |" for key, value in training["recipe"].items()],
        *[f"| {key} | {value} |" for key, value in training["data"].items()],
        "",
    ]


def _calibration(record: dict[str, Any] | None) -> list[str]:
    """How far probabilities are to be believed, before and after they were calibrated."""
    if record is None:
        return []
    before, after = (f"{100 * record[key]:.2f} %" for key in ("error_before", "error_after"))
    return [
        "## Calibration",
        "",
        f"Logits are divided by {record['temperature']:.4g}, which is folded into the head and was fitted to "
        f"{record['fitted_to']} images that the head was not fitted to.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| expected calibration error ({BINS} bins, {record['measured_on']} {record['split']} images) "
        f"| {before} | {after} |",
        "",
    ]


def _closing(step: dict[str, Any]) -> list[str]:
    """What `close_gates` did, and what it cost on the images that it was decided on and on those that it was not."""
    tuned = "without fine-tuning"
    if step["best_epoch"]:
        tuned = f"after fine-tuning with them fixed at 0 (epoch {step['best_epoch']} of {step['epochs']}, "
        tuned += f"learning rate {step['lr']:g})"
    rows = [(_name(key), *step[key]) for key in ("val_accuracy", "val_loss", "test_accuracy") if key in step]
    tries = [
        f"{len(tried['closed'])} after {tried['epochs']} epochs, {100 * tried['val_accuracy']:.2f} %"
        for tried in step["tried"]
    ]
    return [
        "## Closed gates",
        "",
        f"{len(step['closed'])} of {step['open_before']} open gates were closed (blocks "
        f"{', '.join(map(str, step['closed']))}) {tuned}. Validation images decided: at most {step['tolerance']:g} "
        "points of their accuracy could be lost.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *[f"| {name} | {_number(name, before)} | {_number(name, after)} |" for name, before, after in rows],
        "",
        f"Closed gates that were tried, and validation accuracy with them: {'; '.join(tries)}.",
        "",
    ]


def _entry(first_block: int) -> str:
    return f", from block {first_block + 1}" if first_block else ""


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Metrics as text; accuracies in per cent."""
    return [(_name(key), _number(key, value)) for key, value in metrics.items()]


def _number(key: str, value: float) -> str:
    if key == "best_epoch" and value < 0:
        return "none: what training starts from is kept"
    return f"{100 * value:.2f} %" if key.endswith(("accuracy", "miou", "map")) else f"{value:.5g}"


def _name(key: str) -> str:
    if key == "best_epoch":
        return "best epoch (from 0)"
    return key.replace("_", " ").replace("miou", "mIoU").replace(" map", " mean average precision")


def block_table(inspection: Inspection) -> list[str]:
    """What the head reads, and a Markdown table of gates, temperatures, selection ratio and shifts, a row per block."""
    columns = [inspection.gates, inspection.temperatures, inspection.selection_ratio]
    names = ["gate", "temperature", "selection ratio"]
    if inspection.shifts is not None:
        columns.append(inspection.shifts)
        names.append("norm of shifts")
    read = [f"{pool} after block {block}" for block, pool in inspection.taps or []]
    lines = [f"The head reads {', '.join(read)}.", ""] if read else []
    depth = max((len(column) for column in columns if column is not None), default=0)
    if depth == 0:
        return [*lines, "This method learns no gates and no temperatures."]
    rows = [*lines, f"| block | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for index in range(depth):
        values = ["-" if column is None or index >= len(column) else f"{column[index]:.4f}" for column in columns]
        if inspection.gates is not None and inspection.gates[index : index + 1] == [0]:
            values[0] = "closed"
        rows.append(f"| {index + 1} | {' | '.join(values)} |")
    return rows
