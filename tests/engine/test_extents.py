"""Extents never overlap, nothing is lost, and neighbours join."""

import random

import pytest

from gpt_serve.engine.slab import Extents


def test_best_fit() -> None:
    extents = Extents(20)
    starts = [extents.take(length) for length in (4, 1, 2, 1, 12)]
    assert starts == [0, 4, 5, 7, 8]
    assert extents.take(1) is None and extents.free == 0
    extents.give_back(0, 4)
    extents.give_back(5, 2)
    assert extents.take(2) == 5, "the smaller hole fits"
    assert extents.take(3) == 0
    assert extents.free == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_neighbours_join_whatever_the_order(order: tuple[int, ...]) -> None:
    extents = Extents(9)
    for _ in range(3):
        extents.take(3)
    for index in order:
        extents.give_back(3 * index, 3)
    assert extents.take(9) == 0


def test_an_empty_one() -> None:
    assert Extents(0).take(1) is None


@pytest.mark.parametrize("seed", range(5))
def test_against_a_list_of_units(seed: int) -> None:
    chance, size = random.Random(seed), 60
    extents, owner, taken = Extents(size), [None] * size, dict[int, int]()
    for step in range(600):
        if taken and chance.random() < 0.5:
            start = chance.choice(list(taken))
            length = taken.pop(start)
            owner[start : start + length] = [None] * length
            extents.give_back(start, length)
        else:
            length = chance.randint(1, 9)
            runs = "".join("." if unit is None else "x" for unit in owner).split("x")
            found = extents.take(length)
            assert (found is not None) == (max(map(len, runs)) >= length)
            if found is not None:
                assert all(unit is None for unit in owner[found : found + length]), "taken twice"
                owner[found : found + length] = [step] * length
                taken[found] = length
        assert extents.free == owner.count(None)
