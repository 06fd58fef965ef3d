"""Facts about LitServe that ``gpt_serve/serve`` is built on or around; when one changes, so must the server."""

import asyncio
import pickle
import queue
from importlib.metadata import version
from typing import Any

import litserve
import pytest
from fastapi import HTTPException, Request
from litserve.callbacks import CallbackRunner
from litserve.loops.loops import inference_worker
from litserve.loops.simple_loops import BatchedLoop
from litserve.server import RegularRequestHandler, response_queue_to_buffer
from litserve.transport.process_transport import MPQueueTransport
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus

from gpt_serve.serve.worker import WaitingLoop


class Stop(BaseException):
    """Ends a worker loop from inside."""


class Transport:
    """Keeps what the worker sends."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, item: Any, consumer_id: int) -> None:
        self.sent.append((consumer_id, item))


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.batches: list[Any] = []

    def predict(self, x: Any, **_: Any) -> Any:
        self.batches.append(x)
        return [(value, value) for value, *_ in x]

    def encode_response(self, output: Any, **_: Any) -> Any:
        if output[0] == "bad":
            raise HTTPException(404, "one bad item")
        return output


class Queue(queue.Queue[Any]):
    """Raises `Stop` once it is empty."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self.empty() and timeout == 1.0:
            raise Stop
        return super().get(block, timeout)


def serve(*values: str, loop: Any = None) -> tuple[Api, Transport, dict[str, str]]:
    """Put one item per value through LitServe's worker function."""
    api = Api(max_batch_size=3, batch_timeout=0.001, loop=loop or WaitingLoop())
    api.pre_setup()
    api.request_timeout = False
    requests, transport, status = Queue(), Transport(), {"predict_0": WorkerSetupStatus.STARTING}
    for number, value in enumerate(values):
        requests.put((0, f"uid{number}", 0.0, (value, b"image")))
    with pytest.raises(Stop):
        inference_worker(api, "cpu", 0, requests, transport, status, CallbackRunner(), False)
    return api, transport, status


def test_version_is_the_probed_one() -> None:
    assert version("litserve").startswith("0.2.")


def test_the_loop_given_to_the_api_runs_and_tuples_pass_batch_and_unbatch_unchanged() -> None:
    api, transport, status = serve("a", "b", "c", "d")
    assert api.batches == [[("a", b"image"), ("b", b"image"), ("c", b"image")], [("d", b"image")]]
    assert [item[0] for _, item in transport.sent] == ["uid0", "uid1", "uid2", "uid3"]
    assert status == {"predict_0": WorkerSetupStatus.READY}


def test_without_restart_workers_only_answers_are_sent() -> None:
    _, transport, _ = serve("a")
    ((consumer, (uid, (value, status, _, _))),) = transport.sent
    assert (consumer, uid, value, status) == (0, "uid0", ("a", "a"), LitAPIStatus.OK)


def test_an_exception_for_one_item_answers_its_whole_batch() -> None:
    """Hence errors travel as values."""
    _, transport, _ = serve("a", "bad", "c")
    assert [item[1][1] for _, item in transport.sent] == [LitAPIStatus.ERROR] * 3


def test_an_exception_in_setup_is_logged_and_ends_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Api):
        def setup(self, device: str) -> None:
            raise RuntimeError("a bug")

    status = {"predict_0": WorkerSetupStatus.STARTING}
    inference_worker(Failing(), "cpu", 0, Queue(), Transport(), status, CallbackRunner(), False)  # type: ignore[arg-type]
    assert status == {"predict_0": WorkerSetupStatus.ERROR}


def test_the_waiting_loop_still_overrides_what_the_batched_loop_calls() -> None:
    assert "get_batch_requests" in BatchedLoop.run_batched_loop.__code__.co_names
    assert "get_batch_requests" in vars(WaitingLoop)


class Answers:
    """A transport with a fixed list of answers, then cancelled."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items)

    async def areceive(self, consumer_id: int) -> Any:
        if not self.items:
            raise asyncio.CancelledError
        return self.items.pop(0)


def test_answers_go_to_the_buffer_and_late_ones_nowhere() -> None:
    async def main() -> None:
        known = ResponseBufferItem(asyncio.Event())
        buffer = {"known": known}
        answers = Answers(*((uid, ("value", LitAPIStatus.OK, None, 0)) for uid in ("gone", "known")))
        connector = litserve.LitServer(Api(), accelerator="cpu").litapi_connector
        await response_queue_to_buffer(answers, buffer, 0, connector)
        assert known.event.is_set() and known.response == ["value", LitAPIStatus.OK]
        assert list(buffer) == ["known"]

    asyncio.run(main())


def test_the_stock_handler_forgets_nothing_when_its_client_gives_up() -> None:
    """Its entry in the buffer leaks, hence `Server.ask`."""

    async def main() -> None:
        server = litserve.LitServer(Api(), accelerator="cpu")
        server.app.response_queue_id = 0
        server.litapi_request_queues["/predict"] = queue.Queue()
        call = RegularRequestHandler(server.lit_api, server).handle_request({"x": 1}, dict)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await call
        assert len(server.response_buffer) == 1

    asyncio.run(main())


def test_the_transport_survives_pickling_and_wakes_up_when_closed() -> None:
    transport = MPQueueTransport(None, [])
    assert type(pickle.loads(pickle.dumps(transport))) is MPQueueTransport

    async def main() -> None:
        answers: Any = queue.Queue()
        open_transport = MPQueueTransport(None, [answers])
        waiting = asyncio.create_task(open_transport.areceive(0))
        await asyncio.sleep(0.05)
        open_transport.close(send_sentinel=True)
        assert await asyncio.wait_for(waiting, 0.5) is None
        with pytest.raises(asyncio.CancelledError):
            await open_transport.areceive(0)

    asyncio.run(main())


def test_the_stock_app_guards_health_and_answers_in_plain_text() -> None:
    """Hence an app of our own."""
    app = litserve.LitServer(Api(), accelerator="cpu").app
    guarded = {route.path for route in app.routes if getattr(route, "dependencies", None)}
    assert "/health" in guarded
    assert HTTPException not in app.exception_handlers and Request is not None
