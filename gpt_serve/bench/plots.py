"""The curves as pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from gpt_serve.bench.report import Record
from gpt_serve.bench.timing import Row
from gpt_serve.insight.figures import save_figure

COLOURS = {
    "engine": "tab:blue",
    "swapped, grouped by task": "tab:orange",
    "PEFT, LoRA mixed": "tab:green",
    "open": "tab:blue",
    "closed": "tab:orange",
    "deep": "tab:green",
    "uniform": "tab:orange",
    "Zipf(1.1)": "tab:blue",
}
PLAIN = FuncFormatter(lambda value, _: f"{value:,.0f}")


def draw(records: Sequence[Record], folder: Path) -> None:
    """Write a PNG file for each benchmark that was measured and has a picture."""
    for name, panel in {"peers": _peers, "tasks": _tasks, "prompts": _prompts, "bank": _bank, "soak": _soak}.items():
        chosen = [record for record in records if record.name == name and record.rows]
        if chosen:
            width = 5.2 if name == "peers" else 4.6
            figure = Figure((width * len(chosen), 4.2))
            axes = figure.subplots(1, len(chosen), squeeze=False)
            for axis, record in zip(axes[0], chosen, strict=True):
                panel(axis, record.rows)
            figure.tight_layout()
            save_figure(figure, folder / f"{name}.png", dpi=110)


def _peers(axis: Axes, rows: Sequence[Row]) -> None:
    """Draw the throughput of the first case by the bare backbone's."""
    shown = [row for row in rows if row.case == rows[0].case][::-1]
    values = [1 / row.extra["by bare"] for row in shown]
    colours = ["tab:blue" if row.variant.startswith("engine") else "tab:gray" for row in shown]
    bars = axis.barh([row.variant for row in shown], values, color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.set(title=f"{rows[0].backbone}\n{rows[0].case}", xlabel="throughput, bare timm forward = 1")
    axis.set_xlim(0, 1.15 * max(values))
    axis.tick_params(axis="y", labelsize=8)


def _tasks(axis: Axes, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row.variant.rpartition(", ")[0] for row in rows):
        shown = [row for row in rows if row.variant.rpartition(", ")[0] == name]
        _line(axis, name, shown, throughput=True)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(PLAIN)
    axis.set(title=rows[0].backbone, xlabel="tasks in a batch of 64", ylabel="throughput, engine with one task = 1")
    _finish(axis)


def _prompts(axis: Axes, rows: Sequence[Row]) -> None:
    """Draw the times of the largest batch."""
    case = rows[-1].case
    shown = [row for row in rows if row.case == case and re.fullmatch(r"\w+, \d+", row.variant)]
    start = next(row for row in shown if row.variant == "open, 0")
    for name in dict.fromkeys(row.variant.partition(",")[0] for row in shown):
        of_kind = [row for row in shown if row.variant.startswith(f"{name}, ") and row is not start]
        _line(axis, {"open": "gates open", "closed": "gates closed", "deep": "deep"}[name], [start, *of_kind], name)
    counted = [row for row in shown if row.variant.startswith("open")]
    axis.plot(
        [_number(row) for row in counted],
        [row.extra["FLOP ratio"] for row in counted],
        "k--",
        linewidth=1,
        label="FLOPs of all rows",
    )
    axis.set(title=f"{rows[0].backbone}, {case}", xlabel="prompts", ylabel="time, bare timm forward = 1")
    _finish(axis)


def _bank(axis: Axes, rows: Sequence[Row]) -> None:
    for traffic in ("Zipf(1.1)", "uniform"):
        for variant, style in ((" all in host memory", "-"), (" rest on disk", ":")):
            shown = [row for row in rows if row.case.endswith(traffic) and row.variant.endswith(variant)]
            counts = [int(row.case.split()[0].replace(",", "")) for row in shown]
            values = [1 / row.ratio.median for row in shown]
            label = f"{traffic},{variant}"
            axis.plot(counts, values, style, marker="o", markersize=4, color=COLOURS[traffic], label=label)
    axis.axvline(100, color="gray", linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(PLAIN)
    axis.set(title=f"{rows[0].backbone}, bank of 100", xlabel="adapters on disk", ylabel="throughput, all resident = 1")
    _finish(axis)


def _soak(axis: Axes, rows: Sequence[Row]) -> None:
    requests = [int(row.case.split()[1].replace(",", "")) for row in rows]
    axis.plot(requests, [row.extra["MB"] for row in rows])
    axis.xaxis.set_major_formatter(PLAIN)
    axis.set(title="1,000 adapters, 100 resident", xlabel="requests", ylabel="resident memory of the process, MB")
    _finish(axis, legend=False)


def _line(axis: Axes, label: str, rows: Sequence[Row], colour: str = "", throughput: bool = False) -> None:
    """Draw the medians, with a band between the quartiles."""
    points = [_number(row) for row in rows]
    median, low, high = ([getattr(row.ratio, name) for row in rows] for name in ("median", "q1", "q3"))
    if throughput:
        median, low, high = ([1 / value for value in values] for values in (median, high, low))
    axis.plot(points, median, marker="o", markersize=4, color=COLOURS[colour or label], label=label)
    axis.fill_between(points, low, high, color=COLOURS[colour or label], alpha=0.2, linewidth=0)


def _number(row: Row) -> int:
    return int(row.variant.rpartition(", ")[2])


def _finish(axis: Axes, legend: bool = True) -> None:
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=8)
