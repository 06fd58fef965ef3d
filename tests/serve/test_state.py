"""Slots and numbers in the API process."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest

from gpt_serve.engine.bank import BankStats
from gpt_serve.errors import NotReady, Overloaded
from gpt_serve.serve.messages import Passed, Stats
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.state import ServerState


def ready(limit: int) -> ServerState:
    return ServerState(limit, phase="ready")


def take(state: ServerState, task: str, count: int) -> int:
    """How many of ``count`` requests for ``task`` are taken on."""
    taken = 0
    for _ in range(count):
        try:
            state.admit()
        except Overloaded:
            continue
        try:
            state.assign(task)
        except Overloaded:
            state.release()
            continue
        taken += 1
    return taken


@pytest.mark.parametrize(("limit", "share"), [(1, 1), (7, 7), (8, 6), (16, 12), (128, 96)])
def test_one_task_gets_its_share_and_all_together_the_limit(limit: int, share: int) -> None:
    state = ready(limit)
    assert take(state, "flood", 2 * limit) == share == state.admitted
    assert take(state, "trickle", limit) == limit - share
    assert state.admitted == limit and state.by_task == Counter(flood=share, trickle=limit - share)
    with pytest.raises(Overloaded, match=f"^{limit} requests are already waiting"):
        state.admit()
    for task in ["flood"] * share + ["trickle"] * (limit - share):
        state.release(task)
    assert state.admitted == 0 and not state.by_task
    assert take(state, "flood", 1) == 1


def test_a_slot_without_a_task_counts_for_none() -> None:
    """While its body is read, nobody knows whose it is."""
    state = ready(8)
    for _ in range(8):
        state.admit()
    with pytest.raises(Overloaded):
        state.admit()
    for _ in range(6):
        state.assign("flood")
    with pytest.raises(Overloaded, match="^6 requests for this task are already waiting"):
        state.assign("flood")
    state.assign("other")


def test_nothing_is_admitted_while_draining() -> None:
    state = ready(8)
    state.draining = True
    with pytest.raises(NotReady):
        state.admit()


def sample(metrics: Metrics, name: str) -> float:
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith(name + " ")]
    return float(lines[0].split()[1])


def bank(**numbers: Any) -> dict[str, float]:
    return asdict(BankStats(**numbers))


def test_a_new_worker_counts_from_nothing_and_the_server_goes_on() -> None:
    metrics = Metrics(ready(8))
    metrics.worker(Stats(bank(resident=1, loads=1, bytes_used=10, bytes_total=100)), new=True)
    metrics.worker(Stats(bank(resident=2, loads=2, hits=7, load_seconds=0.25), [Passed(0.5, (0.1, 0.2))]), new=False)
    metrics.worker(Stats(bank(resident=2, loads=2, hits=9, load_seconds=0.25), [Passed(0.5, (0.1,))]), new=False)
    assert sample(metrics, "gpt_serve_bank_loads_total") == 2
    assert sample(metrics, "gpt_serve_bank_hits_total") == 9
    metrics.worker(Stats(bank(resident=1, loads=1, hits=3, load_seconds=0.5, bytes_total=100)), new=True)
    assert sample(metrics, "gpt_serve_bank_loads_total") == 3
    assert sample(metrics, "gpt_serve_bank_hits_total") == 12
    assert sample(metrics, "gpt_serve_bank_load_seconds_total") == 0.75
    assert sample(metrics, "gpt_serve_resident_adapters") == 1
    assert sample(metrics, "gpt_serve_bank_bytes") == 100
    assert sample(metrics, "gpt_serve_batch_size_sum") == 3 == sample(metrics, "gpt_serve_queue_seconds_count")
    assert sample(metrics, "gpt_serve_batch_seconds_sum") == 1.0


def test_every_number_of_the_bank_is_shown() -> None:
    metrics = Metrics(ready(8))
    assert {*metrics._held, *metrics._counted} == set(bank())
