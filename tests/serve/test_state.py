"""Slots and numbers in the API process."""

from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gpt_serve.engine.bank import BankStats
from gpt_serve.errors import NotReady, Overloaded
from gpt_serve.serve.messages import Passed, Stats
from gpt_serve.serve.metrics import EngineMetrics, Metrics
from gpt_serve.serve.state import ServerState, Slot


def ready(limit: int) -> ServerState:
    return ServerState(limit, phase="ready")


def take(state: ServerState, task: str, count: int, displaced: list[str] | None = None, tenant: str = "") -> list[Slot]:
    """The slots of those of ``count`` images for ``task`` that are taken on; ``displaced`` gets who loses one."""
    taken, name = [], f"{tenant}/{task}" if tenant else task
    for _ in range(count):
        with suppress(Overloaded):
            taken.append(state.admit((tenant, task), lambda: None if displaced is None else displaced.append(name)))
    return taken


def test_one_task_may_have_all_slots_while_nobody_else_wants_any() -> None:
    state = ready(8)
    flood = take(state, "flood", 20)
    assert len(flood) == 8 == state.admitted
    with pytest.raises(Overloaded, match="^8 images are already waiting"):
        state.admit(("", "flood"), lambda: None)
    for slot in flood:
        state.release(slot)
    assert state.admitted == 0 and len(take(state, "flood", 9)) == 8


@pytest.mark.parametrize("noisy", [1, 2, 3, 5])
def test_a_quiet_task_finds_its_place_however_many_others_are_noisy(noisy: int) -> None:
    """Fixed shares would not do: two tasks with three quarters each are enough to fill all."""
    state, displaced = ready(16), list[str]()
    for number in range(noisy):
        take(state, f"noisy-{number}", 40, displaced)
    displaced.clear()
    quiet = take(state, "quiet", 2)
    assert len(quiet) == 2 and state.admitted == 16 and len(displaced) == 2
    assert all(task.startswith("noisy") for task in displaced)


def test_shares_even_out_and_nobody_displaces_an_equal() -> None:
    state, displaced = ready(16), list[str]()
    take(state, "one", 100, displaced)
    assert len(take(state, "other", 100, displaced)) == 8 and displaced == ["one"] * 8
    assert not take(state, "one", 1) and not take(state, "other", 1)
    assert state.admitted == 16


def test_a_tenant_with_many_tasks_gets_no_more_than_one_with_one() -> None:
    state, displaced = ready(16), list[str]()
    for number in range(8):
        take(state, f"task-{number}", 2, displaced, "many")
    assert len(take(state, "task-0", 40, displaced, "one")) == 8
    assert len(displaced) == 8 and all(name.startswith("many/") for name in displaced)


def test_a_quiet_tenant_finds_its_place_in_a_task_that_another_floods() -> None:
    state, displaced = ready(16), list[str]()
    take(state, "shared", 40, displaced, "noisy")
    assert len(take(state, "shared", 1, displaced, "quiet")) == 1 and displaced == ["noisy/shared"]


def test_within_a_tenant_tasks_even_out() -> None:
    state, displaced = ready(16), list[str]()
    take(state, "a", 8, displaced, "other")
    take(state, "noisy", 8, displaced, "own")
    assert len(take(state, "quiet", 8, displaced, "own")) == 4 and displaced == ["own/noisy"] * 4


def test_a_displaced_slot_is_given_back_only_once() -> None:
    state = ready(2)
    slots = take(state, "one", 2)
    take(state, "other", 1)
    for slot in slots:  # their owners do not know which it was
        state.release(slot)
        state.release(slot)
    assert state.admitted == 1


@pytest.mark.parametrize("each, retry_after", [(0.01, 1.0), (0.5, 4.0), (60.0, 60.0)])
def test_who_is_turned_away_is_told_when_the_queue_will_be_gone(
    monkeypatch: pytest.MonkeyPatch, each: float, retry_after: float
) -> None:
    """At the pace at which it is getting shorter; what was before it was long does not count."""
    now = 1000.0
    monkeypatch.setattr("gpt_serve.serve.state.time.monotonic", lambda: now)
    state = ready(8)
    state.release(state.admit(("", "a"), lambda: None))
    now += 3600
    taken = take(state, "a", 8)
    with pytest.raises(Overloaded) as refused:
        state.admit(("", "a"), lambda: None)
    assert refused.value.seconds == 1, "nothing is known yet"
    for _ in range(20):
        now += each
        state.release(taken.pop(0))
        taken += take(state, "a", 1)
    with pytest.raises(Overloaded) as refused:
        state.admit(("", "a"), lambda: None)
    assert refused.value.seconds == pytest.approx(retry_after)


def test_nothing_is_admitted_while_draining() -> None:
    state = ready(8)
    state.draining = True
    with pytest.raises(NotReady):
        state.admit(("", "a"), lambda: None)


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
    metrics = EngineMetrics(CollectorRegistry())
    assert {*metrics._held, *metrics._counted} == set(bank())
