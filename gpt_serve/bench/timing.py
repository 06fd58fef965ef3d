"""Interleaved timing. Machines drift, so only ratios within a round are compared."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        repeats: rounds of a comparison.
        comparison_seconds: a comparison that has taken this long ends early, after at least `LEAST_ROUNDS` rounds.
        sample_seconds: shorter calls are repeated for this long, and their mean is the time of one.
        load_seconds: of the engine's time, what a run of HTTP requests is worth.
    """

    repeats: int = 20
    comparison_seconds: float = 60.0
    sample_seconds: float = 0.1
    load_seconds: float = 3.0


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over the rounds of a variant's time by the base's time in the same round."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, times: Sequence[float], base: Sequence[float]) -> "Ratio":
        """Compute it from the seconds of each round, in the same order."""
        if len(times) != len(base):
            raise ValueError(f"{len(times)} and {len(base)} rounds cannot be compared")
        q1, median, q3 = np.quantile(np.divide(times, base), [0.25, 0.5, 0.75]).tolist()
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Row:
    """One variant of a comparison.

    Attributes:
        benchmark: ``forward``, ``mixed``, ``engines`` or ``http``.
        case: what all variants of the comparison have in common.
        seconds: per image, median of the rounds.
        ratio: to the first variant of the comparison, which has 1.
        extra: further numbers, by the title of their column.
    """

    benchmark: str
    backbone: str
    case: str
    variant: str
    seconds: float
    rounds: int
    ratio: Ratio
    extra: Mapping[str, float] = field(default_factory=dict)


def interleave(variants: Mapping[str, Callable[[], object]], plan: Plan) -> dict[str, list[float]]:
    """Measure the seconds per call of each variant in each round.

    Every other round runs in reverse (A B C, C B A), so that steady drift favours nobody. Each variant is called once
    before the first round.
    """
    for call in variants.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    began = time.perf_counter()
    for done in range(plan.repeats):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > plan.comparison_seconds:
            break
        for name in sorted(variants, key=list(variants).index, reverse=done % 2 == 1):
            times[name].append(_sample(variants[name], plan.sample_seconds))
    return times


def _sample(call: Callable[[], object], least: float) -> float:
    began, calls = time.perf_counter(), 0
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - began
        if elapsed >= least:
            return elapsed / calls


def to_rows(
    benchmark: str,
    backbone: str,
    case: str,
    images: int,
    times: Mapping[str, Sequence[float]],
    extra: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Row]:
    """Make rows of what `interleave` measured; the first variant is the base.

    Args:
        images: per call.
        extra: by variant.
    """
    base = next(iter(times.values()))
    return [
        Row(
            benchmark,
            backbone,
            case,
            variant,
            seconds=float(np.median(seconds)) / images,
            rounds=len(seconds),
            ratio=Ratio.of(seconds, base),
            extra=(extra or {}).get(variant, {}),
        )
        for variant, seconds in times.items()
    ]
