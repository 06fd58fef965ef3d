"""Passes: every row in one of them, never dearer than a pass for each kind, small enough for a CPU."""

import random
from dataclasses import replace

import pytest

from gpt_serve.engine.passes import Costs, PassPlanner, opened
from gpt_serve.model.batch import Layout
from gpt_serve.specs import Tap

BODY, WIDTH, DEPTH = 197, 384, 12
CLS, MEAN, PATCHES = (Tap(11, pool) for pool in ("cls", "mean", "patches"))
OPEN = Layout((False,) * 11, (CLS,), prompts=100, tempered=True)
CLOSED = Layout((True,) * 11, (CLS,), prompts=100, tempered=True, remembered=12)
BARE = Layout((True,) * 11, (CLS,), trunk=12)
SHORT = replace(OPEN, prompts=5)


def planner(overhead: float = 1e9, most_rows: int | None = None) -> PassPlanner:
    return PassPlanner(BODY, WIDTH, Costs(overhead, None if most_rows is None else most_rows * 16 * WIDTH))


def test_alike_rows_share_a_pass() -> None:
    assert planner().plan([OPEN] * 5) == [[0, 1, 2, 3, 4]]


def test_open_and_closed_rows_are_parted_when_that_pays() -> None:
    kinds = [OPEN, CLOSED] * 8
    assert planner().plan(kinds) == [list(range(1, 16, 2)), list(range(0, 16, 2))]
    assert planner(overhead=1e15).plan(kinds) == [list(range(16))]


def test_a_single_short_one_is_padded_rather_than_parted() -> None:
    assert planner(overhead=2e10).plan([OPEN] * 4 + [SHORT]) == [[0, 1, 2, 3, 4]]
    assert planner(overhead=2e10).plan([OPEN] + [SHORT] * 40) == [list(range(1, 41)), [0]]


def test_prompts_of_different_first_blocks_never_share() -> None:
    late = replace(OPEN, closed=(True, *OPEN.closed[1:]), first_block=1)
    assert planner(overhead=1e15).plan([OPEN, late, OPEN, late]) == [[1, 3], [0, 2]]
    cost = planner().image
    assert cost(OPEN) - cost(late) == pytest.approx(100 * (1 + BODY / (6 * WIDTH)))
    assert opened(late) == late
    forgetful = replace(late, closed=(True,) * 11)
    assert forgetful.constant == 11 and opened(forgetful) == late


@pytest.mark.parametrize(("most", "sizes"), [(None, [10]), (1200, [3, 3, 4]), (297, [1] * 10), (1, [1] * 10)])
def test_passes_are_small_enough_and_alike(most: int | None, sizes: list[int]) -> None:
    assert sorted(map(len, planner(most_rows=most).plan([OPEN] * 10))) == sizes


def test_cost_of_an_image_in_row_blocks() -> None:
    assert planner().image(BARE) == pytest.approx(11 * BODY + BODY / 6)
    assert planner().image(replace(BARE, taps=(PATCHES,))) == pytest.approx(12 * BODY)
    assert planner().image(replace(BARE, taps=(Tap(5, "cls"),))) == pytest.approx(5 * BODY + BODY / 6)
    # Yoo et al.'s 100 prompts: 1.5 times the work with open gates; behind closed ones little more than attention.
    assert planner().image(OPEN) / planner().image(BARE) == pytest.approx(1.55, abs=0.03)
    assert planner().image(CLOSED) / planner().image(BARE) == pytest.approx(1.04, abs=0.02)
    assert planner().image(opened(CLOSED)) == planner().image(OPEN)


def test_what_a_shared_pass_is() -> None:
    deep = replace(CLOSED, layers=12, prompts=7, tempered=False, remembered=4)
    assert Layout.joined([CLOSED, deep]) == replace(CLOSED, layers=12, remembered=4)
    mean = replace(OPEN, taps=(MEAN,))
    assert Layout.joined([CLOSED, mean]) == replace(OPEN, taps=(CLS, MEAN))


def test_a_row_without_prompts_takes_nothing_from_its_mates() -> None:
    """It has no gate that could be open. ViT-B with 100 closed prompts once cost half as much again beside it."""
    assert Layout.joined([BARE, CLOSED]) == replace(CLOSED, trunk=0)
    assert planner(overhead=0).image(Layout.joined([CLOSED, BARE])) == planner().image(CLOSED)
    late = replace(CLOSED, closed=(True,) * 11, first_block=6, remembered=6, trunk=6)
    assert Layout.joined([BARE, late]) == late
    assert planner(overhead=1e15).plan([BARE, late, BARE, late]) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("seed", range(20))
def test_any_mix(seed: int) -> None:
    chance = random.Random(seed)
    kinds = []
    for _ in range(chance.randint(1, 64)):
        closed = chance.choice([0, 4, 11])
        taps = (chance.choice([CLS, MEAN, PATCHES]),)
        prompts, layers = chance.choice([0, 5, 50, 200]), chance.choice([1, 12])
        gates = (True,) * 11 if not prompts else (True,) * closed + (False,) * (11 - closed)
        layout = Layout(gates, taps, layers, prompts, chance.random() < 0.5)
        kinds.append(replace(layout, remembered=layout.constant))
    plans = planner(overhead=10 ** chance.uniform(6, 12))
    passes = plans.plan(kinds)
    assert sorted(index for part in passes for index in part) == list(range(len(kinds)))
    overhead = plans.costs.overhead / (24 * WIDTH**2)

    def cost(parts: list[list[int]]) -> float:
        return sum(
            overhead + len(part) * plans.image(Layout.joined([kinds[index] for index in part])) for part in parts
        )

    alone: dict[Layout, list[int]] = {}
    for index, kind in enumerate(kinds):
        alone.setdefault(kind, []).append(index)
    assert cost(passes) <= cost(list(alone.values())) + 1e-6
