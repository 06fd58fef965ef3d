"""Passes: every row in one of them, never dearer than a pass for each kind, small enough for a CPU."""

import random
from dataclasses import replace

import pytest

from gpt_serve.engine.passes import Costs, PassPlanner, opened, shared
from gpt_serve.engine.slab import Kind
from gpt_serve.model.batch import Plan

BODY, WIDTH, DEPTH = 197, 384, 12
OPEN = Kind(Plan((False,) * 11, "cls"), 1, 100, True)
CLOSED = Kind(Plan((True,) * 11, "cls"), 1, 100, True, remembered=12)
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
    late = replace(OPEN, plan=Plan((True, *OPEN.plan.closed[1:]), "cls"), first_block=1)
    assert planner(overhead=1e15).plan([OPEN, late, OPEN, late]) == [[1, 3], [0, 2]]
    cost = planner().image
    assert cost(OPEN) - cost(late) == pytest.approx(100 * (1 + BODY / (6 * WIDTH)))
    assert opened(late) == late
    forgetful = replace(late, plan=Plan((True,) * 11, "cls"))
    assert forgetful.constant == 11 and opened(forgetful) == late


@pytest.mark.parametrize(("most", "sizes"), [(None, [10]), (1200, [3, 3, 4]), (297, [1] * 10), (1, [1] * 10)])
def test_passes_are_small_enough_and_alike(most: int | None, sizes: list[int]) -> None:
    assert sorted(map(len, planner(most_rows=most).plan([OPEN] * 10))) == sizes


def test_cost_of_an_image_in_row_blocks() -> None:
    bare = replace(OPEN, prompts=0)
    assert planner().image(bare) == pytest.approx(11 * BODY + BODY / 6)
    assert planner().image(replace(bare, plan=Plan((False,) * 11, "mean"))) == pytest.approx(12 * BODY)
    # Yoo et al.'s 100 prompts: 1.5 times the work with open gates; behind closed ones little more than attention.
    assert planner().image(OPEN) / planner().image(bare) == pytest.approx(1.55, abs=0.03)
    assert planner().image(CLOSED) / planner().image(bare) == pytest.approx(1.04, abs=0.02)
    assert planner().image(opened(CLOSED)) == planner().image(OPEN)


def test_what_a_shared_pass_is() -> None:
    deep = replace(CLOSED, layers=12, prompts=7, tempered=False, remembered=4)
    assert shared([CLOSED, deep]) == replace(CLOSED, layers=12, remembered=4)
    assert shared([CLOSED, replace(OPEN, plan=Plan(OPEN.plan.closed, "mean"))]) == Kind(
        Plan((False,) * 11, None), 1, 100, True, 0
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_mix(seed: int) -> None:
    chance = random.Random(seed)
    kinds = []
    for _ in range(chance.randint(1, 64)):
        closed = chance.choice([0, 4, 11])
        plan = Plan((True,) * closed + (False,) * (11 - closed), chance.choice(["cls", "mean"]))
        prompts, layers = chance.choice([0, 5, 50, 200]), chance.choice([1, 12])
        kinds.append(Kind(plan, layers, prompts, chance.random() < 0.5, plan.constant if prompts else 0))
    plans = planner(overhead=10 ** chance.uniform(6, 12))
    passes = plans.plan(kinds)
    assert sorted(index for part in passes for index in part) == list(range(len(kinds)))
    overhead = plans.costs.overhead / (24 * WIDTH**2)

    def cost(parts: list[list[int]]) -> float:
        return sum(overhead + len(part) * plans.image(shared([kinds[index] for index in part])) for part in parts)

    alone: dict[Kind, list[int]] = {}
    for index, kind in enumerate(kinds):
        alone.setdefault(kind, []).append(index)
    assert cost(passes) <= cost(list(alone.values())) + 1e-6
