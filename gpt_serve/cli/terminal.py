"""What the command line shows: progress bars, notices and tables. Everything but results goes to stderr."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from gpt_serve.adapters.store import BrokenAdapter, TaskSummary

if TYPE_CHECKING:  # what trains is heavy, and not needed to list adapters
    from gpt_serve.train.data.views import Unreadable
    from gpt_serve.train.loop import EpochRecord

SHOWN_TRIALS = 20


class Terminal:
    """Reports a training run; bars only where stderr is a terminal.

    Args:
        quiet: say nothing (processes other than the leader).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.epochs = 0  # finished and stored, earlier parts of a resumed run included
        self._bar: tqdm | None = None

    def _open(self, total: int, text: str, done: int = 0, unit: str = "img") -> tqdm:
        self.close()
        off = self.quiet or not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=text, unit=unit, disable=off, leave=False, smoothing=0.1)
        return self._bar

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def notice(self, text: str) -> None:
        """One line on stderr, above the bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def scanning(self, total: int, what: str = "checking images", unit: str = "img") -> Callable[[], object]:
        """A bar over the images that are read, or whatever else is counted."""
        bar = self._open(total, what, unit=unit)
        return lambda: bar.update()

    def counting(self, total: int, what: str) -> Callable[[int], object]:
        """A bar over images of which several are done at a time."""
        bar = self._open(total, what)
        return lambda count: bar.update(count)

    def unreadable(self, images: "list[Unreadable]") -> None:
        """A line per image that cannot be read."""
        self.close()
        for image in images:
            self.notice(f"cannot read {image.name}: {image.reason}")

    def trials(self, total: int, done: int) -> Callable[[], object]:
        """A bar over the trials of a sweep."""
        bar = self._open(total, "sweeping", done, "trial")
        return lambda: bar.update()

    def training(self, images: int, first_epoch: int, epochs: int) -> None:
        """A bar over all images of all epochs, which gives images/s and the time left."""
        self.epochs = first_epoch
        self._open(images * epochs, "training", images * first_epoch)

    def batch(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        """Move the bar on."""
        if self._bar is not None:
            text = f"epoch {epoch + 1} loss {loss:.3f} acc {100 * accuracy:.1f} %"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(images)

    def epoch(self, record: "EpochRecord") -> None:
        """A line per epoch."""
        self.epochs = record.epoch + 1
        val = "" if math.isnan(record.val_accuracy) else f"  val {100 * record.val_accuracy:5.1f} %"
        self.notice(
            f"epoch {record.epoch + 1:3d}  lr {record.lr:.4f}  loss {record.train_loss:.3f}"
            f"  train {100 * record.train_accuracy:5.1f} %{val}"
            f"  {record.images_per_second:.0f} images/s"
        )


def echo_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def echo_trained(summary: dict[str, Any], adapters: Path) -> None:
    """What `train` published: accuracy or mIoU, revision, folder."""
    metrics = summary["metrics"]
    text = f"final fit of {metrics['best_epoch'] + 1} epochs"
    when = f"epoch {metrics['best_epoch'] + 1}" if metrics["best_epoch"] >= 0 else "before any epoch"
    for key, name in (("accuracy", "accuracy"), ("miou", "mIoU"), ("map", "mean average precision")):
        if f"val_{key}" in metrics:
            text = f"validation {name} {100 * metrics[f'val_{key}']:.1f} % ({when})"
        if f"test_{key}" in metrics:
            text += f", test {name} {100 * metrics[f'test_{key}']:.1f} %"
    if "path" in summary:
        where = f"the fine-tuned model is in {summary['path']} and is not served"
    else:
        where = f"revision {summary['revision']} in {adapters / summary['task']}"
    click.echo(f"{summary['task']}: {text}; {where}")


def echo_sweep(header: Sequence[str], rows: Sequence[Sequence[str]], folder: Path) -> None:
    """The best trials, and where all of them are."""
    echo_table(header, rows[:SHOWN_TRIALS])
    more = f"{len(rows) - SHOWN_TRIALS} more trials, " if len(rows) > SHOWN_TRIALS else ""
    click.echo(f"{more}table and plot: {folder / 'sweep.md'}, {folder / 'sweep.png'}")


def echo_closing(summary: dict[str, Any], adapters: Path) -> None:
    """What closing gates came to, in one line."""
    step = summary["closing"]
    task, closed = summary["task"], step["closed"]
    before, after = (f"{100 * value:.1f} %" for value in step["val_accuracy"])
    if not closed:
        text = f"no gate can close with validation accuracy within {step['tolerance']:g} points of {before}"
        click.echo(f"{task}: {text}; revision {summary['revision']} stays")
        return
    text = f"closed {len(closed)} of {step['open_before']} open gates (blocks {', '.join(map(str, closed))})"
    text += f"; validation accuracy {before} before, {after} after"
    if "test_accuracy" in step:
        before, after = (f"{100 * value:.1f} %" for value in step["test_accuracy"])
        text += f"; test accuracy {before} before, {after} after"
    click.echo(f"{task}: {text}; revision {summary['revision']} in {adapters / task}")


def echo_calibrated(summary: dict[str, Any], adapters: Path) -> None:
    """What calibration came to, in one line."""
    task, record = summary["task"], summary["calibration"]
    before, after = (f"{100 * record[key]:.1f} %" for key in ("error_before", "error_after"))
    text = f"calibration error on {record['measured_on']} {record['split']} images {before} before, {after} after"
    click.echo(f"{task}: {text}; revision {summary['revision']} in {adapters / task}")


def echo_tasks(described: Sequence[TaskSummary | BrokenAdapter]) -> None:
    """A line per adapter; of a refused one, the reason."""
    rows = []
    for item in described:
        if isinstance(item, BrokenAdapter):
            rows.append([item.task, f"refused: {item.error}", "", "", "", "", ""])
            continue
        accuracy = "-" if item.val_accuracy is None else f"{100 * item.val_accuracy:.1f} %"
        if item.val_miou is not None:
            accuracy = f"mIoU {100 * item.val_miou:.1f} %"
        size = f"{item.nbytes / 1024:.0f} KiB"
        rows.append([item.task, item.method, item.backbone, str(item.classes), size, item.revision, accuracy])
    echo_table(["task", "method", "backbone", "classes", "size", "revision", "val"], rows)


def echo_exported(result: dict[str, Any]) -> None:
    """What was written, and how close it is to torch."""
    reports = result["verification"] if "tasks" in result else {result["task"]: result["verification"]}
    header = ("task", "images", "max abs difference", "top-1 agreement", "accuracy torch", "accuracy graph")
    rows = []
    for task, report in reports.items():
        accuracy = report.get("accuracy")
        shown = [f"{100 * accuracy[name]:.2f} %" for name in ("torch", "graph")] if accuracy else ["", ""]
        difference, agreement = f"{report['max_abs_difference']:.1e}", f"{100 * report['top1_agreement']:.2f} %"
        rows.append((task, str(report["images"]), difference, agreement, *shown))
    echo_table(header, rows)
    size = f", {result['size_bytes'] / 1e6:.1f} MB, {result['nodes']} nodes" if "nodes" in result else ""
    click.echo(f"{result['output']}{size}")
