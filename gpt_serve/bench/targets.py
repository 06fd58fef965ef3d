"""Which figures the engine should reach, and what was measured of them."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gpt_serve.bench.timing import Ratio, Row


@dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        figure: what it is.
        benchmark: where it comes from.
        matches: which rows have it.
        value: median and quartiles, from the row.
        cpu: what it should be on a CPU.
        gpu: on a GPU.
        least: whether that is the least or the most.
    """

    figure: str
    benchmark: str
    matches: Callable[[Row], bool]
    value: Callable[[Row], Ratio]
    cpu: float
    gpu: float
    least: bool

    def rows(self, measured: Sequence[Row], device: str) -> Iterator[list[str]]:
        """Table cells for every row that has the figure."""
        bound = self.cpu if device == "cpu" else self.gpu
        for row in measured:
            if row.benchmark == self.benchmark and self.matches(row):
                value = self.value(row)
                met = value.median >= bound if self.least else value.median <= bound
                yield [
                    self.figure,
                    f"{row.backbone}, {row.case}, {row.variant}",
                    f"{'>=' if self.least else '<='} {bound:g}",
                    f"{value.median:.3g}",
                    f"{value.q1:.3g}-{value.q3:.3g}",
                    "yes" if met else "no",
                ]


def inverse(row: Row) -> Ratio:
    """Throughput by the base's, where the row has the time by the base's."""
    return Ratio(1 / row.ratio.median, 1 / row.ratio.q3, 1 / row.ratio.q1)


def ratio(row: Row) -> Ratio:
    return row.ratio


def by_flops(row: Row) -> Ratio:
    counted = row.extra["FLOP ratio"]
    return Ratio(row.ratio.median / counted, row.ratio.q1 / counted, row.ratio.q3 / counted)


def own_share(row: Row) -> Ratio:
    """Measured within the calls if it could be, else what the engine takes beyond the forward pass, in percent."""
    if "own share, %" in row.extra:
        share = row.extra["own share, %"]
        return Ratio(share, share, share)
    return Ratio(*(100 * (1 - 1 / value) for value in (row.ratio.median, row.ratio.q1, row.ratio.q3)))


def beyond(row: Row) -> Ratio:
    return Ratio(row.extra["beyond ms"], row.extra["q1"], row.extra["q3"])


def _all_unlike(row: Row) -> bool:
    """Whether the batch has as many tasks as images."""
    return re.fullmatch(r"batch (\d+), \1 tasks", row.case) is not None


TARGETS = (
    Target(
        "1. throughput of 64 tasks by that of one, batch of 64",
        "tasks",
        lambda row: row.variant == "engine, 64",
        inverse,
        0.95,
        0.97,
        True,
    ),
    Target(
        "2. time with 100 prompts behind closed gates by the bare backbone's",
        "prompts",
        lambda row: row.variant in ("closed, 100", "deep, 100"),
        ratio,
        1.20,
        1.15,
        False,
    ),
    Target(
        "3. time with 100 prompts and open gates by the bare backbone's, by the FLOP ratio",
        "prompts",
        lambda row: row.variant == "open, 100",
        by_flops,
        1.05,
        1.05,
        False,
    ),
    Target(
        "4. throughput by the authors-style loop's",
        "peers",
        lambda row: row.variant.startswith("authors"),
        ratio,
        1.3,
        1.5,
        True,
    ),
    Target(
        "4. the same, as `gpt-serve serve` computes on a CPU (onnxruntime)",
        "peers",
        lambda row: row.variant == "engine, onnxruntime",
        lambda row: Ratio(*3 * (row.extra["speed by authors"],)),
        1.3,
        1.5,
        True,
    ),
    Target(
        "4. throughput of bf16, compiled, by the authors-style loop's in fp32",
        "peers",
        lambda row: row.variant == "engine, bf16, compiled",
        lambda row: Ratio(*3 * (row.extra["speed by authors"],)),
        4,
        4,
        True,
    ),
    Target(
        "5. throughput by that of swapping grouped by task, as many tasks as images",
        "peers",
        lambda row: row.variant.startswith("swapped, grouped") and _all_unlike(row),
        ratio,
        2,
        8,
        True,
    ),
    Target(
        "6. the engine's own work, % of the time at batch 32",
        "overhead",
        lambda row: row.variant == "engine",
        own_share,
        3,
        5,
        False,
    ),
    Target(
        "7. throughput with 100 of 10,000 adapters in the bank by that with all, Zipf(1.1)",
        "bank",
        lambda row: row.case == "10,000 on disk, Zipf(1.1)" and row.variant != "all resident",
        inverse,
        0.85,
        0.9,
        True,
    ),
    Target(
        "8. first answer of a cold adapter beyond that of a resident one, ms",
        "cold",
        lambda row: row.variant == "from disk",
        beyond,
        10,
        10,
        False,
    ),
    Target(
        "9. throughput of saturated HTTP by the engine's alone",
        "http",
        lambda row: row.variant.endswith("clients"),
        inverse,
        0.85,
        0,
        True,
    ),
    Target(
        "10. memory grown in 100,000 requests over 1,000 adapters, MB",
        "soak",
        lambda row: row.case == "after 100,000 requests",
        lambda row: Ratio(*3 * (row.extra["MB grown"],)),
        30,
        30,
        False,
    ),
)


def targets(rows: Sequence[Row], device: str) -> list[list[str]]:
    """Cells of the summary's rows."""
    kind = "cpu" if device == "cpu" else "gpu"
    return [cells for target in TARGETS for cells in target.rows(rows, kind)]
