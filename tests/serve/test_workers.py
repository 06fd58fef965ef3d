"""Several workers behind one port: who is asked, and who answers when one dies."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpt_serve.cli.options import resolve_devices
from gpt_serve.errors import NotReady, UnknownTask, UsageError
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.messages import Answer, Item, Stats
from gpt_serve.serve.metrics import _COUNTED, _HELD, Metrics
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.workers import ATTEMPTS, Workers
from tests.serve.harness import START_SECONDS, ServerProcess, children, serving, until
from tests.serve.test_fronts import fronts


class Stub:
    """A worker that answers when it is told to; keeps what it was asked."""

    def __init__(self, number: int, state: ServerState) -> None:
        self.number, self.state, self.phase = number, state, "ready"
        self.asked: list[tuple[Item, asyncio.Future[Answer]]] = []

    @property
    def owed(self) -> int:
        return sum(not future.done() for _, future in self.asked)

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        self.asked.append((item, asyncio.get_running_loop().create_future()))
        return self.asked[-1][1]

    def answer_all(self) -> None:
        for item, future in self.asked:
            if not future.done():
                future.set_result(Answer(item.task, f"worker {self.number}", b""))

    def die(self) -> None:
        self.phase = "restarting"
        self.fail_pending("the worker died")

    def fail_pending(self, reason: str) -> None:
        for _, future in self.asked:
            if not future.done():
                future.set_exception(NotReady(reason))


def item(task: str) -> Item:
    return Item(task=task, image=b"x", format=None, expires=0.0)  # type: ignore[arg-type]


def workers(count: int) -> tuple[Workers, list[Stub]]:
    state = ServerState(8)
    stubs = [Stub(number, state) for number in range(count)]
    return Workers(stubs, busy=2), stubs  # type: ignore[arg-type]


async def turn() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_a_task_stays_with_one_worker_until_that_is_busy() -> None:
    async def main() -> None:
        all_workers, stubs = workers(2)
        for _ in range(2):
            all_workers.ask(item("birds"))
        assert sorted(stub.owed for stub in stubs) == [0, 2], "its adapter is there already"
        all_workers.ask(item("birds"))
        assert sorted(stub.owed for stub in stubs) == [1, 2], "a hot adapter comes to others, too"
        for number in range(40):
            all_workers.ask(item(f"task-{number}"))
        assert abs(stubs[0].owed - stubs[1].owed) <= 1

    run(main)


def test_what_a_dead_worker_owed_is_asked_of_another() -> None:
    async def main() -> None:
        all_workers, stubs = workers(2)
        futures = [all_workers.ask(item(f"task-{number}")) for number in range(8)]
        stubs[0].die()
        await turn()
        stubs[1].answer_all()
        await turn()
        assert [future.result().revision for future in futures] == ["worker 1"] * 8
        late = all_workers.ask(item("birds"))
        stubs[1].answer_all()
        assert (await late).revision == "worker 1", "nobody asks one that is restarting"

    run(main)


def test_an_image_that_workers_die_of_is_not_asked_again_for_ever() -> None:
    async def main() -> None:
        all_workers, stubs = workers(3)
        future = all_workers.ask(item("birds"))
        for _ in range(ATTEMPTS):
            next(stub for stub in stubs if stub.owed).die()
            await turn()
        assert isinstance(future.exception(), NotReady) and sum(len(stub.asked) for stub in stubs) == ATTEMPTS

    run(main)


def test_other_errors_and_the_servers_end_are_not_tried_again() -> None:
    async def main() -> None:
        all_workers, stubs = workers(2)
        unknown, late, gone = (all_workers.ask(item(task)) for task in ("birds", "cars", "cats"))
        for stub in stubs:
            for asked, inner in stub.asked:
                if asked.task == "birds":
                    inner.set_exception(UnknownTask("no task"))
        gone.cancel()
        await turn()
        assert isinstance(unknown.exception(), UnknownTask)
        assert [inner.cancelled() for stub in stubs for asked, inner in stub.asked if asked.task == "cats"] == [True]
        all_workers.fail_pending("the server is shutting down")
        await turn()
        assert isinstance(late.exception(), NotReady) and sum(len(stub.asked) for stub in stubs) == 3

    run(main)


def test_together_they_are_ready_while_one_is() -> None:
    state = ServerState(8)
    for number in range(2):
        state.enter(number, "loading")
    assert state.phase == "loading"
    state.enter(1, "ready")
    assert state.phase == "ready"
    state.enter(0, "ready")
    state.enter(1, "restarting")
    assert state.phase == "ready"
    state.enter(0, "restarting")
    assert state.phase == "restarting"


def test_their_numbers_add_up() -> None:
    metrics = Metrics(ServerState(8))

    def told(number: int, new: bool, **numbers: float) -> None:
        metrics.worker(Stats(dict.fromkeys([*_HELD, *_COUNTED], 0.0) | numbers), new=new, number=number)

    told(0, True, resident=2, hits=1)
    told(1, True, resident=3, hits=0)
    told(0, False, resident=2, hits=5)
    told(1, False, resident=4, hits=2)
    told(0, True, resident=1, hits=0)
    told(0, False, resident=1, hits=1)
    text = metrics.text().decode()
    assert "gpt_serve_resident_adapters 5.0" in text and "gpt_serve_bank_hits_total 8.0" in text


@pytest.mark.parametrize(
    "options", [{"device": "cuda:0,cuda:0"}, {"device": "cpu,cpu"}, {"device": "cpu,cuda:0"}, {"device": "cuda:0,"}]
)
def test_devices_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServeConfig(**options)


def test_devices() -> None:
    assert ServeConfig(replicas=2).devices == ["cpu", "cpu"] and ServeConfig().devices == ["cpu"]
    config = ServeConfig(device="cuda:0,cuda:1")
    assert config.devices == ["cuda:0", "cuda:1"] and config.chosen_engine == "torch"
    with pytest.raises(UsageError, match="name several devices instead"):
        ServeConfig(device="cuda:0,cuda:1", replicas=2)


@pytest.mark.parametrize("count, expected", [(0, "cuda"), (1, "cuda:0"), (3, "cuda:0,cuda:1,cuda:2")])
def test_cuda_is_all_gpus(monkeypatch: pytest.MonkeyPatch, count: int, expected: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert resolve_devices("cuda") == expected
    assert resolve_devices("cpu") == "cpu" and resolve_devices("cuda:2, cuda:0") == "cuda:2,cuda:0"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two stubs as workers, behind two HTTP processes."""
    yield from serving(tmp_path_factory.mktemp("two"), stub=True, replicas=2, http_workers=2, queue_limit=64)


def test_a_killed_worker_loses_nothing(two: ServerProcess, image: bytes) -> None:
    """What it had is answered by the other, which answers all along; then there are two again."""

    def ask(task: str) -> int:
        return two.client.post(f"{two.url}/predict/{task}", content=image).status_code

    until(lambda: two.metric("gpt_serve_workers_ready") == 2, START_SECONDS)
    with ThreadPoolExecutor(24) as pool, two.holding():
        pending = [pool.submit(ask, f"held-{number}") for number in range(24)]
        until(lambda: two.in_flight() == 24)
        os.kill(workers_of(two)[0], signal.SIGKILL)
        assert [ask("good") for _ in range(8)] == [200] * 8
        assert two.get("/ready").status_code == 200
        until(lambda: two.metric("gpt_serve_worker_restarts") == 1)
        assert two.in_flight() == 24
    assert [job.result() for job in pending] == [200] * 24
    until(lambda: two.metric("gpt_serve_workers_ready") == 2, START_SECONDS)


def workers_of(server: ServerProcess) -> list[int]:
    """The children that hold no listening socket: not the HTTP processes, nor what tracks resources."""
    others = set(children(server.pid)) - set(fronts(server))
    return [pid for pid in others if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
