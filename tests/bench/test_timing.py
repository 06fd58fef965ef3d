import itertools

import pytest

from gpt_serve.bench import timing
from gpt_serve.bench.timing import LEAST_ROUNDS, Plan, Ratio, interleave, to_rows


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Not the ratio of the medians, which is 3 here: a slow round slows both sides."""
    ratio = Ratio.of([2.0, 30.0, 3.0, 40.0, 3.0], [1.0, 10.0, 1.0, 20.0, 1.0])
    assert (ratio.median, ratio.q1, ratio.q3) == (3.0, 2.0, 3.0)
    assert Ratio.of([6.0, 1.0, 2.0], [1.0, 10.0, 4.0]) == Ratio(median=0.5, q1=0.3, q3=3.25)


def test_ratio_of_one_round_has_no_spread() -> None:
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)


def test_ratio_refuses_unequal_rounds() -> None:
    with pytest.raises(ValueError, match="2 and 1 rounds"):
        Ratio.of([1.0, 2.0], [1.0])


def test_rows_are_per_image_and_relative_to_the_first_variant() -> None:
    base, other = to_rows(
        "forward", "tiny", "batch 8", 8, {"a": [8.0, 16.0, 8.0], "b": [4.0, 8.0, 8.0]}, {"b": {"FLOP ratio": 2.0}}
    )
    assert (base.variant, base.seconds, base.ratio, base.extra) == ("a", 1.0, Ratio(1.0, 1.0, 1.0), {})
    assert (other.variant, other.seconds, other.rounds) == ("b", 1.0, 3)
    assert other.ratio == Ratio(0.5, 0.5, 0.75)
    assert other.extra == {"FLOP ratio": 2.0}


def test_rounds_alternate_after_a_warm_up() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(variants, Plan(repeats=3, sample_seconds=0))
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds it a second later."""
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("ticking")
def test_a_slow_comparison_ends_early_but_not_at_once() -> None:
    times = interleave({"a": lambda: None}, Plan(repeats=100, comparison_seconds=1, sample_seconds=0))
    assert len(times["a"]) == LEAST_ROUNDS


@pytest.mark.usefixtures("ticking")
def test_short_calls_are_repeated_and_averaged() -> None:
    calls: list[int] = []
    times = interleave({"a": lambda: calls.append(0)}, Plan(repeats=1, sample_seconds=5))
    assert len(calls) == 1 + 5
    assert times == {"a": [1.0]}
