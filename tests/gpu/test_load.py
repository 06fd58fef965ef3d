"""Under load: a bank that is too small, and a device that has no memory left."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.scheduler import Scheduler
from gpt_serve.engine.slab import Packed
from gpt_serve.errors import GPTServeError
from gpt_serve.model.backbone import Backbone
from tests.factories import make_adapter
from tests.gpu.conftest import png, stored

TASKS, IMAGES = 12, 4
ROOM = 3  # adapters in the bank: most requests find theirs elsewhere, and every slot is used again and again
EVICTIONS, MOST_SECONDS = 100, 60


@pytest.fixture(scope="module")
def hot_store(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    """Adapters of one size, closed ones among them, whose keys and values are computed when they come to the device."""
    methods = ("gated", "vpt-deep", "gated-hard", "linear")
    made: list[Adapter] = [
        make_adapter(backbone.spec, f"task-{n}", method=methods[n % len(methods)], prompts=6, seed=n)
        for n in range(TASKS)
    ]
    return stored(tmp_path_factory.mktemp("hot"), made)


@pytest.fixture(scope="module")
def expected(backbone: Backbone, hot_store: AdapterStore) -> dict[tuple[str, int], torch.Tensor]:
    """Class probabilities by an engine whose bank holds all, one request at a time."""
    engine = Engine(backbone, hot_store)
    answers = {}
    for task in hot_store.tasks():
        for number in range(IMAGES):
            (result,) = engine.predict([(task, png(backbone, number))])
            assert isinstance(result, Prediction)
            answers[task, number] = result.probabilities
    return answers


def check(result: Prediction, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(result.probabilities, wanted, rtol=0, atol=1e-4)


@contextmanager
def scheduling(engine: Engine) -> Iterator[Scheduler]:
    scheduler = Scheduler(engine, max_batch=16, batch_timeout=0.001, overlap=engine.backbone.device.type != "cpu")
    try:
        yield scheduler
    finally:
        scheduler.close()


def test_answers_stay_right_while_adapters_are_evicted(
    backbone: Backbone, hot_store: AdapterStore, expected: dict[tuple[str, int], torch.Tensor]
) -> None:
    """On a GPU they are copied and computed on a stream of their own beside the passes."""
    spec = backbone.spec
    largest = max(Packed.of(hot_store.load(task).adapter, spec).extent(0) for task in hot_store.tasks())
    engine = Engine(backbone, hot_store, bank_bytes=(ROOM * largest + 1) * spec.width * 4, host_bytes=20_000)
    stopped, wrong = threading.Event(), []

    def send(seed: int, scheduler: Scheduler) -> None:
        choose = random.Random(seed)
        try:
            while not stopped.is_set():
                requests = [(choose.choice(hot_store.tasks()), choose.randrange(IMAGES)) for _ in range(4)]
                futures = [scheduler.submit(task, png(backbone, n), time.monotonic() + 60) for task, n in requests]
                for request, future in zip(requests, futures, strict=True):
                    check(future.result(timeout=60), expected[request])
        except Exception as error:
            wrong.append(error)
            stopped.set()

    with scheduling(engine) as scheduler:
        clients = [threading.Thread(target=send, args=(seed, scheduler)) for seed in range(6)]
        for client in clients:
            client.start()
        end = time.monotonic() + MOST_SECONDS
        while engine.bank.stats().evictions < EVICTIONS and not stopped.is_set() and time.monotonic() < end:
            time.sleep(0.01)
        stopped.set()
        for client in clients:
            client.join()
    assert wrong == []
    assert engine.bank.stats().evictions >= EVICTIONS


@contextmanager
def starved(engine: Engine) -> Iterator[None]:
    """No memory on the device; the CPU has so much that running out is only pretended."""
    if engine.backbone.device.type == "cpu":
        forward = engine.forward

        def fail(*_: Any) -> Any:
            raise torch.OutOfMemoryError("pretended")

        engine.forward = fail
        try:
            yield
        finally:
            engine.forward = forward
        return
    torch.cuda.empty_cache()
    hoard, size = [], 2**32
    while size >= 2**18:
        try:
            hoard.append(torch.empty(size, dtype=torch.uint8, device=engine.backbone.device))
        except torch.OutOfMemoryError:
            size //= 2
    try:
        yield
    finally:
        hoard.clear()
        torch.cuda.empty_cache()


def test_running_out_of_memory_fails_the_batch_and_not_the_engine(
    backbone: Backbone, hot_store: AdapterStore, expected: dict[tuple[str, int], torch.Tensor]
) -> None:
    engine = Engine(backbone, hot_store)
    task = hot_store.tasks()[0]
    ask: Callable[[], Any] = lambda: scheduler.submit(task, png(backbone, 0), time.monotonic() + 60)  # noqa: E731
    with scheduling(engine) as scheduler:
        check(ask().result(timeout=60), expected[task, 0])
        with starved(engine):
            errors = [future.exception(timeout=60) for future in [ask() for _ in range(16)]]
        assert {type(error) for error in errors} == {GPTServeError}
        assert {str(error) for error in errors} == {"OutOfMemoryError in the engine"}
        for future in [ask() for _ in range(16)]:
            check(future.result(timeout=60), expected[task, 0])


def test_a_bank_that_the_device_has_no_room_for_is_refused(
    backbone: Backbone, hot_store: AdapterStore, tmp_path: Path
) -> None:
    with pytest.raises(GPTServeError, match="use fewer --bank-bytes"):
        Engine(backbone, hot_store, bank_bytes=2**50)
