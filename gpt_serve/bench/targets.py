"""Which figures the engine should reach, and what was measured of them."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpt_serve.bench.timing import Ratio, Row


class Target(NamedTuple):
    """What a figure should be.

    Attributes:
        benchmark: where it comes from.
        rows: matches ``<case>; <variant>`` of the rows that have it.
        value: median and quartiles, from such a row.
        least: whether the bound is the least or the most that it should be.
        cpu: the bound on a CPU.
        gpu: the bound on a GPU.
    """

    benchmark: str
    rows: str
    value: Callable[[Row], Ratio]
    least: bool
    cpu: float
    gpu: float


def _time(row: Row) -> Ratio:
    return row.ratio


def _speed(row: Row) -> Ratio:
    """Return the throughput by the base's, where the row has the time by the base's."""
    return Ratio(1 / row.ratio.median, 1 / row.ratio.q3, 1 / row.ratio.q1)


def _by_flops(row: Row) -> Ratio:
    counted = row.extra["FLOP ratio"]
    return Ratio(row.ratio.median / counted, row.ratio.q1 / counted, row.ratio.q3 / counted)


def _own_share(row: Row) -> Ratio:
    """Return what was measured within the calls, or else the engine's time beyond the forward pass, in percent."""
    if "own share, %" in row.extra:
        return Ratio(*3 * (row.extra["own share, %"],))
    return Ratio(*(100 * (1 - 1 / value) for value in (row.ratio.median, row.ratio.q1, row.ratio.q3)))


def _beyond(row: Row) -> Ratio:
    return Ratio(row.extra["beyond ms"], row.extra["q1"], row.extra["q3"])


def _extra(name: str) -> Callable[[Row], Ratio]:
    return lambda row: Ratio(*3 * (row.extra[name],))


TARGETS = {
    "1. throughput of 64 tasks by that of one, batch of 64": Target(
        "tasks", r".*; engine, 64", _speed, True, 0.95, 0.97
    ),
    "2. time with 100 prompts behind closed gates by the bare backbone's": Target(
        "prompts", r".*; (closed|deep), 100", _time, False, 1.20, 1.15
    ),
    "3. time with 100 prompts and open gates by the bare backbone's, by the FLOP ratio": Target(
        "prompts", r".*; open, 100", _by_flops, False, 1.05, 1.05
    ),
    "4. throughput by the authors-style loop's": Target("peers", r".*; authors.*", _time, True, 1.3, 1.5),
    "4. the same, as `gpt-serve serve` computes on a CPU (onnxruntime)": Target(
        "peers", r".*; engine, onnxruntime", _extra("speed by authors"), True, 1.3, 1.5
    ),
    "4. throughput of bf16, compiled, by the authors-style loop's in fp32": Target(
        "peers", r".*; engine, bf16, compiled", _extra("speed by authors"), True, 4, 4
    ),
    "5. throughput by that of swapping grouped by task, as many tasks as images": Target(
        "peers", r"batch (\d+), \1 tasks; swapped, grouped.*", _time, True, 2, 8
    ),
    "6. the engine's own work, % of the time at batch 32": Target("overhead", r".*; engine", _own_share, False, 3, 5),
    "7. throughput with 100 of 10,000 adapters in the bank by that with all, Zipf(1.1)": Target(
        "bank", r"10,000 on disk, Zipf\(1\.1\); (?!all resident).*", _speed, True, 0.85, 0.9
    ),
    "8. first answer of a cold adapter beyond that of a resident one, ms": Target(
        "cold", r".*; from disk", _beyond, False, 10, 10
    ),
    "9. throughput of saturated HTTP by the engine's alone, 64 clients": Target(
        "http", r".*; 64 clients", _speed, True, 0.85, 0
    ),
    "10. memory grown in 100,000 requests over 1,000 adapters, MB": Target(
        "soak", r"after 100,000 requests; .*", _extra("MB grown"), False, 30, 30
    ),
}


def targets(rows: Sequence[Row], device: str) -> list[list[str]]:
    """Return the summary's cells: figure, where it was measured, bound, median, quartiles, whether it is reached."""
    cells = []
    for figure, target in TARGETS.items():
        bound = target.cpu if device == "cpu" else target.gpu
        for row in rows:
            if row.benchmark == target.benchmark and re.fullmatch(target.rows, f"{row.case}; {row.variant}"):
                value = target.value(row)
                met = value.median >= bound if target.least else value.median <= bound
                where, sign = f"{row.backbone}, {row.case}, {row.variant}", ">=" if target.least else "<="
                numbers = [f"{sign} {bound:g}", f"{value.median:.3g}", f"{value.q1:.3g}-{value.q3:.3g}"]
                cells.append([figure, where, *numbers, "yes" if met else "no"])
    return cells
