"""The worker's verbs and its loop, in process."""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from litserve.callbacks import CallbackRunner
from litserve.loops.loops import inference_worker
from litserve.utils import WorkerSetupStatus

from gpt_serve.engine.bank import BankStats
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Row
from gpt_serve.engine.scheduler import Scheduler
from gpt_serve.errors import CheckpointError, GPTServeError, UndecodableImage, UnknownTask
from gpt_serve.serve import ServeConfig, litserve
from gpt_serve.serve.link import _LONG, Link, _frame, take_all
from gpt_serve.serve.litserve import CONSUMER, PipeTransport, PredictAPI, report
from gpt_serve.serve.messages import Answer, Answered, Asked, Failure, Format, Item, Ready


@dataclass(frozen=True, eq=False)
class Resident:
    task: str
    preprocess: None = None
    masks: bool = False


class Bank:
    def __init__(self) -> None:
        self.taken = 0

    def try_take(self, task: str) -> Resident:
        if task == "unknown":
            raise UnknownTask("no such task")
        self.taken += 1
        return Resident(task)

    def release(self, resident: Resident) -> None: ...

    def stats(self) -> BankStats:
        return BankStats(resident=1, hits=self.taken)


class Engine:
    """Answers everything alike, unless the image is ``bad`` or the task ``broken``."""

    def __init__(self) -> None:
        self.bank = Bank()
        self.backbone = SimpleNamespace(spec="the spec")

    def prepare(self, resident: Any, image: bytes) -> Row | GPTServeError:
        return UndecodableImage("damaged") if image == b"bad" else self.row(resident, torch.zeros(1))

    def row(self, resident: Any, image: torch.Tensor) -> Row:
        return Row(resident, image)

    def compute(self, rows: Sequence[Row]) -> list[Prediction]:
        if any(row.resident.task == "broken" for row in rows):
            raise RuntimeError("a bug")
        return [Prediction(row.resident.task, "0123456789ab", ("a", "b"), torch.tensor([0.25, 0.75])) for row in rows]


class Recorder:
    """A transport that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: deque[Any] = deque()

    def send(self, item: Any, consumer_id: int) -> None:
        assert consumer_id == CONSUMER
        self.sent.append(item)


class Ended(BaseException):
    """Instead of the end of this process."""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        assert code != 0
        raise Ended

    monkeypatch.setattr("os._exit", end)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, ending: None) -> PredictAPI:
    """As the worker has it before ``setup``, with an engine that loads at once."""
    monkeypatch.setattr("gpt_serve.serve.litserve.guard_child", lambda: None)
    monkeypatch.setattr("gpt_serve.serve.litserve.configure_logging", lambda: None)
    monkeypatch.setattr(litserve, "_load_engine", lambda config, device: Engine())
    made = PredictAPI(ServeConfig())
    made.transport = Recorder()  # type: ignore[assignment]
    return made


def item(task: str, top_k: int = 5, *, image: bytes = b"image", seconds: float = 10) -> Item:
    return Item(task, image, Format(top_k), time.monotonic() + seconds)


def work(api: PredictAPI, *messages: list[Asked]) -> dict[int, Any]:
    """Put messages through LitServe's worker function; the replies by number."""
    wanted = sum(len(message) for message in messages)
    sent: deque[Any] = api.transport.sent  # type: ignore[attr-defined]

    class Requests:
        left = list(messages)

        def recv(self) -> Any:
            if self.left:
                return self.left.pop(0)
            end = time.monotonic() + 10
            while sum(len(message.replies) for message in sent if isinstance(message, Answered)) < wanted:
                assert time.monotonic() < end
                time.sleep(0.001)
            raise EOFError

    status = {"predict_0": WorkerSetupStatus.STARTING}
    with pytest.raises(Ended):
        inference_worker(api, "cpu", 0, Requests(), api.transport, status, CallbackRunner(), False)  # type: ignore[arg-type]
    api.scheduler.close()
    answers = [reply for message in sent if isinstance(message, Answered) for reply in message.replies]
    assert len({number for number, _ in answers}) == wanted == len(answers)
    return dict(answers)


def test_errors_are_values(api: PredictAPI) -> None:
    replies = work(
        api,
        [Asked(0, item("unknown")), Asked(1, item("good", 1))],
        [Asked(2, item("good", image=b"bad")), Asked(3, item("good", seconds=-1)), Asked(4, item("broken"))],
        [Asked(5, item("other"))],
    )
    assert replies[0] == Failure("UnknownTask", "no such task")
    best = {"label": "b", "probability": 0.75}
    assert content(replies[1]) == {"task": "good", "revision": "0123456789ab", "predictions": [best]}
    assert replies[2] == Failure("UndecodableImage", "damaged")
    assert replies[3] == Failure("DeadlineExceeded", "the deadline passed while the request was queued")
    assert replies[4] == Failure("GPTServeError", "RuntimeError in the engine")
    predictions = [best, {"label": "a", "probability": 0.25}]
    assert content(replies[5]) == {"task": "other", "revision": "0123456789ab", "predictions": predictions}


def content(reply: Any) -> Any:
    assert isinstance(reply, Answer) and reply.revision == "0123456789ab" and reply.media_type == "application/json"
    return json.loads(reply.content)


def test_an_answer_that_cannot_be_encoded_is_one_failure(api: PredictAPI, caplog: pytest.LogCaptureFixture) -> None:
    """The thread that sends all answers lives on."""
    output: Future[Prediction] = Future()
    output.set_result(Prediction("odd", "0123456789ab", ("a", "b"), torch.full((2,), float("nan"))))
    assert isinstance(api.encode_response(output), Failure)


def test_numbers_come_along_once(api: PredictAPI) -> None:
    work(api, [Asked(number, item("good")) for number in range(20)], [Asked(20, item("good", image=b"bad"))])
    messages = api.transport.sent  # type: ignore[attr-defined]
    assert isinstance(messages[0], Ready) and messages[0].spec == "the spec"
    assert messages[0].stats.passes == [] and messages[0].stats.bank["hits"] == 0
    waits = [wait for message in messages for done in message.stats.passes for wait in done.waits]
    assert len(waits) == 20 and all(0 <= wait < 10 for wait in waits)
    bank = messages[-1].stats.bank
    assert bank["hits"] == 21 and bank["resident"] == 1


def test_a_backbone_that_cannot_be_loaded_is_reported(api: PredictAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: ServeConfig, device: str) -> None:
        raise CheckpointError("the file is damaged")

    monkeypatch.setattr(litserve, "_load_engine", refuse)
    with pytest.raises(Ended):
        api.setup("cpu")
    assert list(api.transport.sent) == [Failure("CheckpointError", "the file is damaged")]  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_cuda_where_there_is_none_is_refused(engine: Any) -> None:
    with pytest.raises(GPTServeError, match="use cpu"):
        litserve._load_engine(ServeConfig(engine=engine, device="cuda"), "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_decoding_runs_beside_passes_on_a_gpu_only(api: PredictAPI, device: str) -> None:
    api.setup(device)
    assert isinstance(api.scheduler, Scheduler) and api.scheduler.overlap is (device != "cpu")
    api.scheduler.close()


CUDA_FAILURE = "[ONNXRuntimeError] : 1 : FAIL : CUDA failure {}: what happened ; GPU=0 ; hostname=here"


def test_a_lost_device_ends_the_worker_and_nothing_else_does(ending: None, caplog: pytest.LogCaptureFixture) -> None:
    for error in (torch.AcceleratorError("illegal memory access"), RuntimeError(CUDA_FAILURE.format(700))):
        with pytest.raises(Ended):
            report(error)
    report(RuntimeError(CUDA_FAILURE.format(2)))  # out of memory
    report(ValueError("a bug"))


# The link


def test_a_link_carries_items_and_messages_in_order() -> None:
    """From one megabyte to nothing, in as many pieces as the socket makes of them."""

    async def main() -> None:
        link, received = Link(), list[Any]()
        worker = type(link.worker)(os.dup(link.worker.fileno()))  # as a spawned one has it
        ended = asyncio.Event()
        await link.start(received.append, ended.set)
        for number in range(100):
            link.send((number, b"x" * 50_000))
        got: list[Any] = []
        while len(got) < 100:
            got += await asyncio.to_thread(worker.recv)
        assert [number for number, _ in got] == list(range(100))
        transport = PipeTransport(worker)
        for size in (0, 1, 1_000_000, 3):
            await asyncio.to_thread(transport.send, b"x" * size, CONSUMER)
        worker.close()  # the worker dies
        await asyncio.wait_for(ended.wait(), 30)
        assert [len(message) for message in received] == [0, 1, 1_000_000, 3]
        link.send((100, b"nobody reads it"))
        await asyncio.sleep(0)
        link.close()

    asyncio.run(main())


def test_a_link_whose_worker_does_not_read_holds_nobody_up() -> None:
    async def main() -> None:
        link = Link()
        worker = type(link.worker)(os.dup(link.worker.fileno()))
        await link.start(lambda message: None, lambda: None)
        for _ in range(50):
            link.send(b"x" * 1_000_000)
            await asyncio.sleep(0)
        assert sum(map(len, await asyncio.to_thread(worker.recv))) >= 1_000_000, "later it may"
        worker.close()
        link.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_frames_are_those_of_multiprocessing() -> None:
    """Also those of two gigabytes and more, which have a longer head."""
    ours, theirs = Pipe()
    ours.send_bytes(b"abc")
    data = bytearray(os.read(theirs.fileno(), 100))
    assert _frame(data) == (4, 7) and _frame(data[:6]) is None and _frame(data[:3]) is None
    assert _frame(bytearray(_LONG.pack(-1, 3)) + b"abcd") == (12, 15) and _frame(bytearray(_LONG.pack(-1, 3))) is None
    for end in (ours, theirs):
        end.close()


def test_take_all_waits_for_the_first_only() -> None:
    queue: SimpleQueue[int] = SimpleQueue()
    taken: list[list[int]] = []
    thread = Thread(target=lambda: taken.append(take_all(queue)))
    thread.start()
    time.sleep(0.02)
    assert not taken
    queue.put(1)
    thread.join()
    for number in (2, 3, 4):
        queue.put(number)
    assert taken == [[1]] and take_all(queue) == [2, 3, 4]
