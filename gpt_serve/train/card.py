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


def confusion_matrix(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    """int64 (C, C): rows are true classes, columns predicted ones."""
    return torch.bincount(targets * classes + predictions, minlength=classes**2).view(classes, classes)


def write_card(folder: Path, adapter: Adapter, revision: str, confusion: Tensor, split: str) -> None:
    """Write ``README.md``, ``gates.png`` and ``confusion.png`` into the adapter's folder, each as a whole.

    Args:
        confusion: (C, C) on the images of ``split``.

    Raises:
        OSError: the disk refuses.
    """
    inspection = inspect_adapter(adapter)
    plot_inspection(inspection, f"{adapter.task} ({adapter.method})", folder / "gates.png")
    plot_confusion(confusion, adapter.labels, f"{adapter.task}: {split} images", folder / "confusion.png")
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card_text(adapter, revision, inspection, split), encoding="utf-8")


def plot_confusion(confusion: Tensor, labels: Sequence[str], title: str, path: Path) -> None:
    """Write a (C, C) confusion matrix, normalised by row, as a PNG."""
    from matplotlib.figure import Figure

    side = min(14.0, max(4.5, 0.35 * len(labels) + 2))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= 120:
        size = 8 if len(labels) <= 30 else 4
        axes.set_xticks(range(len(labels)), [_plain(label) for label in labels], rotation=90, fontsize=size)
        axes.set_yticks(range(len(labels)), [_plain(label) for label in labels], fontsize=size)
    save_figure(figure, path, dpi=120)


def _plain(label: str) -> str:
    """Labels are folder names: matplotlib must not read mathematics into them."""
    return label.replace("$", r"\$")


def card_text(adapter: Adapter, revision: str, inspection: Inspection, split: str) -> str:
    """The model card in Markdown.

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
        "| | |",
        "|---|---|",
        f"| revision | `{revision}` |",
        f"| created | {adapter.created} |",
        f"| backbone | `{adapter.backbone}` (`{adapter.backbone_sha256[:12]}`) |",
        f"| prompts | {adapter.prompts}{' per block' if adapter.deep else ''}{_entry(adapter.first_block)} |",
        f"| trainable parameters | {training['trainable_parameters']:,} |",
        *[f"| {name} | {value} |" for name, value in _metrics(training["metrics"])],
        "",
        f"![gates, temperatures and selection ratio](gates.png) ![confusion matrix on {split}](confusion.png)",
        "",
        "## Blocks",
        "",
        *block_table(inspection),
        "",
        *[line for step in training.get("closing", []) for line in _closing(step)],
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *[f"| {key} | {value} |" for key, value in training["recipe"].items()],
        *[f"| {key} | {value} |" for key, value in training["data"].items()],
        "",
    ]
    return "\n".join(lines)


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


def _metrics(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Metrics as text; accuracies in per cent."""
    return [(_name(key), _number(key, value)) for key, value in metrics.items()]


def _number(key: str, value: float) -> str:
    return f"{100 * value:.2f} %" if key.endswith("accuracy") else f"{value:.5g}"


def _name(key: str) -> str:
    return "best epoch (from 0)" if key == "best_epoch" else key.replace("_", " ")


def block_table(inspection: Inspection) -> list[str]:
    """A Markdown table of gates, temperatures and selection ratio, a row per block."""
    columns = [inspection.gates, inspection.temperatures, inspection.selection_ratio]
    depth = max((len(column) for column in columns if column is not None), default=0)
    if depth == 0:
        return ["This method learns no gates and no temperatures."]
    rows = ["| block | gate | temperature | selection ratio |", "|---|---|---|---|"]
    for index in range(depth):
        values = ["-" if column is None or index >= len(column) else f"{column[index]:.4f}" for column in columns]
        if inspection.gates is not None and inspection.gates[index : index + 1] == [0]:
            values[0] = "closed"
        rows.append(f"| {index + 1} | {' | '.join(values)} |")
    return rows
