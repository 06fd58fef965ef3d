"""Scheduling with an engine whose every step is under control: fairness, cold adapters, a full bank, pins."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Row
from gpt_serve.engine.priority import NICENESS
from gpt_serve.engine.scheduler import Batch, Scheduler
from gpt_serve.engine.scheduler.jobs import Pending
from gpt_serve.engine.scheduler.pace import Load
from gpt_serve.engine.scheduler.pipeline import ROWS
from gpt_serve.errors import (
    BankFull,
    DeadlineExceeded,
    GPTServeError,
    NotReady,
    UndecodableImage,
    UnknownTask,
    UsageError,
)

SLOW_WORK = 1000.0  # of a row of the task ``slow``


class Resident:
    """Of an adapter that wants images in a way of its own, unless ``shared`` says that they are alike."""

    shared = False
    masks = False

    def __init__(self, task: str) -> None:
        self.task = task

    @property
    def preprocess(self) -> object:
        return "alike" if self.shared else object()


class Bank:
    """Room for ``size`` adapters; counts pins, and complains about one that is given back twice."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.residents: dict[str, Resident] = {}
        self.pins: Counter[Resident] = Counter()
        self.taken = 0
        self.wrong: list[str] = []
        self.changed = threading.Condition()
        self.slow: dict[str, threading.Event] = {}  # tasks whose file takes until the event to read

    def try_take(self, task: str) -> Resident | None:
        if task.startswith("unknown"):
            raise UnknownTask(f"no task {task}")
        if task.startswith("broken"):
            raise RuntimeError("a bug in the bank")
        with self.changed:
            return self._pin(task) if task in self.residents else None

    def take(self, task: str, timeout: float) -> Resident:
        if task in self.slow:
            self.slow[task].wait()
        if task.startswith("refused"):
            raise UnknownTask(f"{task} went away")
        if task.startswith("huge"):
            raise BankFull("larger than the bank")
        with self.changed:
            if not self.changed.wait_for(lambda: task in self.residents or self._make_room(), timeout):
                raise BankFull("everything is pinned")
            self.residents.setdefault(task, Resident(task))
            return self._pin(task)

    def release(self, resident: Resident) -> None:
        with self.changed:
            self.pins[resident] -= 1
            if self.pins[resident] < 0:
                self.wrong.append(resident.task)
            self.changed.notify_all()

    def _pin(self, task: str) -> Resident:
        self.taken += 1
        self.pins[self.residents[task]] += 1
        return self.residents[task]

    def _make_room(self) -> bool:
        idle = [task for task, resident in self.residents.items() if not self.pins[resident]]
        if len(self.residents) >= self.size and idle:
            del self.residents[idle[0]]
        return len(self.residents) < self.size


class Engine:
    """Images say what happens: ``bad`` cannot be decoded, ``bug`` breaks the decoder, ``crash`` the pass."""

    def __init__(self, size: int = 100, seconds: float = 0.0, decode_seconds: float = 0.0) -> None:
        self.bank = Bank(size)
        self.seconds = seconds
        self.decode_seconds = decode_seconds
        self.batches: list[list[str]] = []
        self.decoded: list[str] = []
        self.computing = False
        self.overlapped = 0
        self.gate, self.decoder_gate = threading.Event(), threading.Event()  # passes and decoders wait for them
        self.slow_gate, self.computing_slow = threading.Event(), False  # passes of the task ``slow`` wait for it
        self.slow_gate.set()
        self.gate.set()
        self.decoder_gate.set()

    def prepare(self, resident: Resident, image: bytes) -> Row | GPTServeError:
        self.overlapped += self.computing
        self.decoder_gate.wait()
        time.sleep(self.decode_seconds)
        self.decoded.append(resident.task)
        if image == b"bad":
            return UndecodableImage("damaged")
        if image == b"bug":
            raise RuntimeError("a bug in the decoder")
        return self.row(resident, torch.tensor(list(image)))

    def row(self, resident: Resident, image: torch.Tensor) -> Row:
        return Row(resident, image, SLOW_WORK if resident.task == "slow" else 1.0)  # type: ignore[arg-type]

    def compute(self, rows: Sequence[Row]) -> list[Prediction]:
        if rows[0].resident.task == "slow":
            self.computing_slow = True
            self.slow_gate.wait()
        else:
            self.computing = True
            self.gate.wait()
            time.sleep(self.seconds)
            self.computing = False
        self.batches.append([row.resident.task for row in rows])
        if any(bytes(row.image.tolist()) == b"crash" for row in rows):
            raise RuntimeError("a bug in the pass")
        return [Prediction(row.resident.task, "0" * 12, (), row.image) for row in rows]


@contextmanager
def scheduling(engine: Engine, **options: Any) -> Iterator[Scheduler]:
    """A scheduler; at the end, every pin must have been given back once."""
    options = {"max_batch": 8, "batch_timeout": 0.005, "overlap": True} | options
    scheduler = Scheduler(engine, **options)  # type: ignore[arg-type]
    try:
        yield scheduler
    finally:
        engine.gate.set()
        engine.decoder_gate.set()
        engine.slow_gate.set()
        for event in engine.bank.slow.values():
            event.set()
        scheduler.close()
    until(lambda: not +engine.bank.pins)
    assert not engine.bank.wrong


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def soon(seconds: float = 60) -> float:
    return time.monotonic() + seconds


def error_of(future: Future[Prediction]) -> BaseException | None:
    return future.exception(timeout=10)


@pytest.mark.parametrize("overlap", [True, False])
def test_answers_reach_their_own_requests(overlap: bool) -> None:
    """Seven tasks share a bank of three; every answer carries its request's image and task."""
    with scheduling(Engine(size=3), overlap=overlap) as scheduler:
        futures = [scheduler.submit(f"task-{i % 7}", bytes([i]), soon()) for i in range(200)]
        for i, future in enumerate(futures):
            answer = future.result(timeout=10)
            assert (answer.task, answer.probabilities.tolist()) == (f"task-{i % 7}", [i])


def test_what_is_waiting_goes_together_and_nothing_waits_for_nobody() -> None:
    engine, batches = Engine(), []  # type: ignore[var-annotated]
    with scheduling(engine, batch_timeout=30.0, on_batch=batches.append) as scheduler:
        assert scheduler.submit("a", b"x", soon()).result(timeout=20), "nothing else is on its way: it starts at once"
        engine.gate.clear()
        futures = [scheduler.submit("a", b"first", soon())]
        until(lambda: engine.computing)
        futures += [scheduler.submit("a", b"x", soon()) for _ in range(11)]
        until(lambda: len(scheduler._ready) == 11)
        engine.gate.set()
        wait(futures, timeout=10)
    assert [len(batch) for batch in engine.batches] == [1, 1, 8, 3]
    assert [len(batch.waits) for batch in batches] == [1, 1, 8, 3]
    assert all(isinstance(batch, Batch) and min(batch.waits) >= 0 for batch in batches)


def test_a_batch_waits_for_what_is_on_its_way_but_not_for_long() -> None:
    engine = Engine()
    engine.bank.slow["cold"] = threading.Event()
    with scheduling(engine, batch_timeout=0.1) as scheduler:
        scheduler.submit("a", b"x", soon()).result(timeout=20)
        cold = scheduler.submit("cold", b"x", soon())
        began = time.monotonic()
        scheduler.submit("a", b"x", soon()).result(timeout=20)
        assert time.monotonic() - began >= 0.1
        with_mate = scheduler.submit("a", b"x", soon())
        engine.bank.slow.pop("cold").set()
        wait([cold, with_mate], timeout=10)
    assert [sorted(batch) for batch in engine.batches[1:]] == [["a"], ["a", "cold"]]


def test_a_flood_of_one_task_does_not_hold_up_another() -> None:
    """Each trickling request is answered within the pass that runs and the next two, while the flood lasts."""
    engine = Engine()
    with scheduling(engine) as scheduler:
        flood = [scheduler.submit("flood", b"x", soon()) for _ in range(240)]
        for number in range(1, 6):
            engine.gate.clear()
            until(lambda: engine.computing)
            before = len(engine.batches)
            trickle = scheduler.submit("trickle", b"x", soon())
            until(lambda number=number: engine.decoded.count("trickle") == number)
            flood += [scheduler.submit("flood", b"x", soon()) for _ in range(80)]
            engine.gate.set()
            trickle.result(timeout=10)
            assert ["trickle" in batch for batch in engine.batches[before:]].index(True) <= 2
        wait(flood, timeout=30)
    assert "trickle" not in engine.batches[-1], "the flood was over before"


def test_decoding_takes_turns_too() -> None:
    """A request does not queue behind a flood's images."""
    engine = Engine()
    engine.decoder_gate.clear()
    with scheduling(engine) as scheduler:
        flood = [scheduler.submit("flood", b"x", soon()) for _ in range(200)]
        trickle = scheduler.submit("trickle", b"x", soon())
        until(lambda: len(scheduler._decoding.small) == 201 - (os.cpu_count() or 1))  # the rest is with the decoders
        engine.decoder_gate.set()
        wait([trickle, *flood], timeout=10)
    assert engine.decoded.index("trickle") < 2 * (os.cpu_count() or 1) + 2


def test_without_overlap_nothing_is_decoded_during_a_pass() -> None:
    engine = Engine(seconds=0.002, decode_seconds=0.001)
    with scheduling(engine, overlap=False) as scheduler:
        wait([scheduler.submit("a", b"x", soon()) for _ in range(60)], timeout=10)
    assert engine.overlapped == 0
    engine = Engine(seconds=0.002, decode_seconds=0.001)
    with scheduling(engine) as scheduler:
        wait([scheduler.submit("a", b"x", soon()) for _ in range(60)], timeout=10)
    assert engine.overlapped > 0


def test_without_overlap_a_batch_waits_for_decoding_as_long_as_it_pays() -> None:
    """With a window of nothing batches still fill up: the next rows come faster than passes over few would go."""
    engine = Engine(seconds=0.015, decode_seconds=0.0005)
    with scheduling(engine, overlap=False, batch_timeout=0.0, max_batch=64) as scheduler:
        scheduler.submit("a", b"x", soon()).result(timeout=10)
        wait([scheduler.submit("a", b"x", soon()) for _ in range(64)], timeout=10)
    assert len(engine.batches) <= 6, "nearly all share a pass"


def test_a_cold_adapter_holds_up_its_own_requests_only() -> None:
    engine = Engine()
    engine.bank.slow["cold"] = threading.Event()
    with scheduling(engine) as scheduler:
        cold = [scheduler.submit("cold", bytes([i]), soon()) for i in range(5)]
        for task in ("a", "b", "a", "b"):
            scheduler.submit(task, b"x", soon()).result(timeout=20)
        assert not any(future.done() for future in cold)
        engine.bank.slow["cold"].set()
        assert [future.result(timeout=20).probabilities.tolist() for future in cold] == [[i] for i in range(5)]


def test_a_full_bank_with_more_tasks_than_room() -> None:
    engine = Engine(size=2, seconds=0.001)
    with scheduling(engine) as scheduler:
        futures = [scheduler.submit(f"task-{i % 20}", b"x", soon()) for i in range(200)]
        assert all(future.result(timeout=20).task == f"task-{i % 20}" for i, future in enumerate(futures))
    assert engine.bank.taken == 200


def test_hot_adapters_leave_room_for_a_cold_one() -> None:
    """Two tasks fill the bank, and their requests never end; a third is answered all the same."""
    engine = Engine(size=2, seconds=0.001)
    stopped = threading.Event()
    with scheduling(engine) as scheduler:

        def flood(task: str) -> None:
            running: list[Future[Prediction]] = []
            while not stopped.is_set():
                running = [future for future in running if not future.done()]
                running += [scheduler.submit(task, b"x", soon()) for _ in range(20 - len(running))]
                time.sleep(0.0005)
            for future in running:
                future.result(timeout=10)

        threads = [threading.Thread(target=flood, args=(task,)) for task in ("a", "b")]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.batches) > 10)
        try:
            for task in ("c", "d", "e"):
                scheduler.submit(task, b"x", soon()).result(timeout=10)
        finally:
            stopped.set()
            for thread in threads:
                thread.join()


def test_expired_requests_are_answered_on_time_and_never_computed() -> None:
    engine = Engine(size=1)
    engine.bank.slow["cold"] = threading.Event()
    with scheduling(engine) as scheduler:
        assert isinstance(error_of(scheduler.submit("a", b"x", soon(-1))), DeadlineExceeded)
        loading = scheduler.submit("cold", b"x", soon(0.1))
        assert isinstance(error_of(loading), DeadlineExceeded)
        assert not engine.bank.slow["cold"].is_set(), "its adapter is still being read"
        engine.gate.clear()
        running = scheduler.submit("a", b"x", soon())
        until(lambda: engine.computing)
        queued = scheduler.submit("a", b"x", soon(0.05))
        without_room = scheduler.submit("b", b"x", soon(1.5))
        until(lambda: scheduler._admission._starving)
        held = scheduler.submit("a", b"x", soon(0.05))
        assert isinstance(error_of(held), DeadlineExceeded) and not without_room.done()
        assert isinstance(error_of(without_room), DeadlineExceeded)
        engine.gate.set()
        assert isinstance(error_of(queued), DeadlineExceeded) and error_of(running) is None
        scheduler.submit("b", b"x", soon()).result(timeout=20)
    assert engine.batches == [["a"], ["b"]]


def test_every_failure_is_its_requests_own() -> None:
    reported: list[Exception] = []
    engine = Engine()
    with scheduling(engine, on_error=reported.append) as scheduler:
        engine.gate.clear()
        requests = [("a", b"bad"), ("a", b"bug"), ("a", b"crash"), ("unknown", b"x"), ("refused", b"x"), ("huge", b"x")]
        requests += [("broken", b"x"), ("a", b"good"), ("b", b"good")]
        futures = [scheduler.submit(task, image, soon()) for task, image in requests]
        until(lambda: sum(future.done() for future in futures) == 6)
        engine.gate.set()
        errors = [error_of(future) for future in futures]
    kinds = [UndecodableImage, GPTServeError, GPTServeError, UnknownTask, UnknownTask, BankFull, GPTServeError]
    assert [type(error) for error in errors[:7]] == kinds
    assert errors[7] is errors[8] is None
    assert {str(error) for error in reported} == {"a bug in the decoder", "a bug in the pass", "a bug in the bank"}


def test_those_who_wait_for_one_adapter_get_an_error_each() -> None:
    engine = Engine()
    engine.bank.slow["refused"] = threading.Event()
    with scheduling(engine) as scheduler:
        futures = [scheduler.submit("refused", b"x", soon()) for _ in range(3)]
        engine.bank.slow["refused"].set()
        errors = [error_of(future) for future in futures]
    assert [type(error) for error in errors] == [UnknownTask] * 3 and len({id(error) for error in errors}) == 3


def test_a_slow_row_holds_up_no_others() -> None:
    """On a CPU, where it is computed beside them; what a row is worth and how long it took says that it is slow."""
    engine = Engine()
    with scheduling(engine, overlap=False) as scheduler:
        for work, seconds in ((1.0, 0.01), (SLOW_WORK, 2.0)):
            scheduler._pace.learn(Load([Row(None, torch.zeros(1), work)]), seconds)  # type: ignore[arg-type]
        engine.slow_gate.clear()
        slow = [scheduler.submit("slow", b"x", soon()) for _ in range(3)]
        until(lambda: engine.computing_slow)
        assert scheduler.submit("a", b"x", soon()).result(timeout=10).task == "a"
        assert not any(job.done() for job in slow) and scheduler.busy() > 0
        engine.slow_gate.set()
        assert [job.result(timeout=10).task for job in slow] == ["slow"] * 3
    assert sorted(engine.batches) == [["a"], ["slow"], ["slow"], ["slow"]]


def test_a_large_image_holds_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoded by threads that yield to all others."""
    monkeypatch.setattr("gpt_serve.engine.scheduler.pipeline.pixels", lambda image: 10**8 if image == b"large" else 1)
    names: dict[str, set[tuple[str, int]]] = {"a": set(), "large": set()}
    engine = Engine()
    prepare = engine.prepare

    def noted(resident: Resident, image: bytes) -> Row | GPTServeError:
        niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        names[resident.task].add((threading.current_thread().name, niceness))
        return prepare(resident, image)

    engine.prepare = noted  # type: ignore[method-assign]
    with scheduling(engine, overlap=False) as scheduler:
        futures = [scheduler.submit("large", b"large", soon()) for _ in range(3)]
        futures += [scheduler.submit("a", bytes([i]), soon()) for i in range(20)]
        wait(futures, timeout=20)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert {name for name, _ in names["a"]} == {"decode"} and {name for name, _ in names["large"]} == {"decode-large"}
    assert {niceness for _, niceness in names["a"]} == {own}
    if sys.platform == "linux":
        assert min(niceness for _, niceness in names["large"]) > own or own >= NICENESS


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), "photo.jpg", None])
def test_what_cannot_be_taken_is_refused_at_once(image: Any) -> None:
    """And does not end the thread that would have met it."""
    with scheduling(Engine()) as scheduler:
        with pytest.raises(UsageError, match="the bytes of an image file"):
            scheduler.submit("a", image, soon())
        assert scheduler.submit("a", b"x", soon()).result(timeout=10).task == "a"


def test_closing_answers_everything_once() -> None:
    engine = Engine(size=2, decode_seconds=0.001)
    engine.bank.slow["cold"] = threading.Event()
    with scheduling(engine) as scheduler:
        scheduler.submit("a", b"x", soon()).result(timeout=20)
        engine.gate.clear()
        futures = [scheduler.submit("a", b"x", soon())]
        until(lambda: engine.computing)
        futures += [scheduler.submit(task, b"x", soon()) for task in ("a", "cold", "b", "c", "d") * 10]
        closing = threading.Thread(target=scheduler.close)
        closing.start()
        until(lambda: sum(future.done() for future in futures) == 50)
        engine.gate.set()
        closing.join()
        assert error_of(futures[0]) is None, "the pass that ran was finished"
        assert all(isinstance(error_of(future), NotReady) for future in futures[1:])
        assert isinstance(error_of(scheduler.submit("a", b"x", soon())), NotReady)
        assert isinstance(error_of(scheduler.submit("new", b"x", soon())), NotReady)


def test_the_other_threads_keep_their_share_of_the_cores() -> None:
    """Decoders compute with one thread each, and only they."""
    seen: dict[str, int] = {}

    class Counting(Engine):
        def prepare(self, resident: Resident, image: bytes) -> Row | GPTServeError:
            seen["decode"] = torch.get_num_threads()
            return super().prepare(resident, image)

        def compute(self, rows: Sequence[Row]) -> list[Prediction]:
            seen["compute"] = torch.get_num_threads()
            return super().compute(rows)

    torch.set_num_threads(3)
    try:
        with scheduling(Counting()) as scheduler:
            scheduler.submit("a", b"x", soon()).result(timeout=20)
        assert seen == {"decode": 1, "compute": 3} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_callbacks_that_fail_do_not_end_the_threads(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def count(batch: Batch) -> None:
        raise RuntimeError("a bug in the counter")

    def hear(error: Exception) -> None:
        told.append(str(error))
        raise RuntimeError("a bug in the reporter")

    with scheduling(Engine(), on_batch=count, on_error=hear) as scheduler:
        for image in (b"good", b"crash", b"bug", b"good"):
            future = scheduler.submit("task", image, soon())
            assert (error_of(future) is None) == (image == b"good")
    assert set(told) == {"a bug in the counter", "a bug in the pass", "a bug in the decoder"}
    assert [record.getMessage() for record in caplog.records] == ["whoever is told of errors failed"] * len(told)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_parts_of_a_requests_time_are_told(overlap: bool) -> None:
    with scheduling(Engine(seconds=0.1, decode_seconds=0.05), overlap=overlap) as scheduler:
        began = time.monotonic()
        futures = [scheduler.submit("task", b"x", soon()) for _ in range(3)]
        for future in futures:
            future.result(timeout=20)
        total = time.monotonic() - began
        for future in futures:
            assert isinstance(future, Pending)
            assert set(future.seconds) == {"queueing", "decoding", "computing"} and min(future.seconds.values()) >= 0
            assert future.seconds["decoding"] >= 0.05 and future.seconds["computing"] >= 0.1
            assert sum(future.seconds.values()) <= total


# Several jobs about one image


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that all want images in the same way."""
    monkeypatch.setattr(Resident, "shared", True)


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("overlap", [True, False])
def test_an_image_is_decoded_once_for_all_who_ask_about_it(overlap: bool) -> None:
    """Twelve tasks; half of them come while it is decoded, the others while the pass runs."""
    engine = Engine()
    with scheduling(engine, overlap=overlap, batch_timeout=0.0) as scheduler:
        for number in range(12):
            scheduler.submit(f"task-{number}", b"warm", soon()).result(timeout=20)
        engine.decoded.clear()
        engine.batches.clear()
        engine.gate.clear()
        engine.decoder_gate.clear()
        first = [scheduler.submit(f"task-{number}", b"image", soon()) for number in range(6)]
        until(lambda: sum(map(len, scheduler._decoding.shared._following.values())) == 5)
        engine.decoder_gate.set()
        until(lambda: engine.computing)
        later = [scheduler.submit(f"task-{number}", bytes(bytearray(b"image")), soon()) for number in range(6, 12)]
        until(lambda: len(scheduler._decoding.small) + len(scheduler._ready) == 6)
        engine.gate.set()
        answers = [future.result(timeout=20) for future in [*first, *later]]
    assert [answer.task for answer in answers] == [f"task-{number}" for number in range(12)]
    assert all(bytes(answer.probabilities.tolist()) == b"image" for answer in answers)
    assert len({id(answer.probabilities) for answer in answers[:6]}) == 1, "one tensor, which the pass computes once"
    assert len(engine.decoded) == 1 and sorted(engine.batches[0]) == [f"task-{number}" for number in range(6)]


@pytest.mark.usefixtures("alike")
def test_those_who_share_a_broken_image_get_an_error_each() -> None:
    reported: list[Exception] = []
    engine = Engine()
    with scheduling(engine, on_error=reported.append) as scheduler:
        for image, kind in ((b"bad", UndecodableImage), (b"bug", GPTServeError)):
            engine.decoder_gate.clear()
            futures = [scheduler.submit(f"task-{number}", image, soon()) for number in range(5)]
            until(lambda: sum(map(len, scheduler._decoding.shared._following.values())) == 4)
            engine.decoder_gate.set()
            errors = [error_of(future) for future in futures]
            assert {type(error) for error in errors} == {kind} and len(set(map(id, errors))) == 5
    assert len(engine.decoded) == 2 and len(reported) == 1


@pytest.mark.usefixtures("alike")
def test_who_gives_up_takes_no_image_from_those_who_share_it() -> None:
    engine = Engine()
    engine.decoder_gate.clear()
    with scheduling(engine) as scheduler:
        leader = scheduler.submit("a", b"image", soon())
        until(lambda: scheduler._decoding.shared._following)
        follower, other = (scheduler.submit(task, b"image", soon()) for task in ("b", "c"))
        until(lambda: sum(map(len, scheduler._decoding.shared._following.values())) == 2)
        scheduler.abandon(leader)
        scheduler.abandon(other)
        engine.decoder_gate.set()
        assert bytes(follower.result(timeout=20).probabilities.tolist()) == b"image"
        assert isinstance(error_of(leader), DeadlineExceeded) and isinstance(error_of(other), DeadlineExceeded)
        late = scheduler.submit("a", b"image", soon(-1))
        assert isinstance(error_of(late), DeadlineExceeded)
    assert not scheduler._decoding.shared._following


@pytest.mark.usefixtures("alike")
def test_probes_of_one_image_fill_no_batch() -> None:
    """They are one row of the pass, whatever their number, up to ``ROWS`` for each that a batch may hold."""

    class Probing(Engine):
        def row(self, resident: Resident, image: torch.Tensor) -> Row:
            return Row(resident, image, work=1.0, trunk=1.0)  # type: ignore[arg-type]

    engine = Probing()
    with scheduling(engine, max_batch=2, batch_timeout=5.0) as scheduler:
        for number in range(20):
            scheduler.submit(f"task-{number}", b"warm", soon()).result(timeout=20)
        engine.batches.clear()
        engine.gate.clear()
        held = scheduler.submit("task-0", b"held", soon())
        until(lambda: engine.computing)
        futures = [scheduler.submit(f"task-{number}", b"image", soon()) for number in range(20)]
        until(lambda: len(scheduler._ready) == 20)
        assert scheduler._ready.images == 1
        engine.gate.set()
        wait([held, *futures], timeout=20)
    assert [len(batch) for batch in engine.batches] == [1, 2 * ROWS, 20 - 2 * ROWS]
