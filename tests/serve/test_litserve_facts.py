"""Facts about LitServe that ``gpt_serve/serve`` is built on or around; when one changes, so must the server."""

import asyncio
import queue
from importlib.metadata import version
from typing import Any

import litserve
import pytest
from fastapi import HTTPException, Request
from litserve.callbacks import CallbackRunner
from litserve.loops.base import LitLoop
from litserve.loops.loops import inference_worker
from litserve.loops.simple_loops import BatchedLoop
from litserve.server import RegularRequestHandler
from litserve.utils import LitAPIStatus, WorkerSetupStatus


class Stop(BaseException):
    """Ends a worker loop from inside."""


class Transport:
    """Keeps what the worker sends."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, item: Any, consumer_id: int) -> None:
        self.sent.append((consumer_id, item))


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None: ...

    def predict(self, x: Any, **_: Any) -> Any:
        return x

    def encode_response(self, output: Any, **_: Any) -> Any:
        if output == "bad":
            raise HTTPException(404, "one bad item")
        return output


class Queue(queue.Queue[Any]):
    """Raises `Stop` once it is empty."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self.empty():
            raise Stop
        return super().get(block, timeout)


class Loop(LitLoop):
    """Keeps what it is called with."""

    def __call__(self, *arguments: Any) -> None:
        self.arguments = arguments


def test_version_is_the_probed_one() -> None:
    assert version("litserve").startswith("0.2.")


def test_the_loop_given_to_the_api_runs_after_setup_with_the_very_queue_and_transport() -> None:
    """Hence both may be anything that our own loop understands."""
    loop = Loop()
    api, requests, transport, status = Api(loop=loop), object(), Transport(), {"predict_0": WorkerSetupStatus.STARTING}
    api.pre_setup()
    inference_worker(api, "cpu", 0, requests, transport, status, CallbackRunner(), False)
    assert loop.arguments[:5] == (api, "cpu", 0, requests, transport)
    assert status == {"predict_0": WorkerSetupStatus.READY}
    assert transport.sent == []


def test_an_exception_for_one_item_answers_its_whole_batch() -> None:
    """One more reason for a loop of our own, in which errors travel as values."""
    api = Api(max_batch_size=3, batch_timeout=0.05, loop=BatchedLoop())
    api.pre_setup()
    api.request_timeout = False
    api.batch, api.unbatch = (lambda items: items), (lambda items: items)
    requests, transport = Queue(), Transport()
    for number, value in enumerate(("a", "bad", "c")):
        requests.put((0, f"uid{number}", 0.0, value))
    with pytest.raises(Stop):
        inference_worker(api, "cpu", 0, requests, transport, {}, CallbackRunner(), False)
    assert [item[1][1] for _, item in transport.sent] == [LitAPIStatus.ERROR] * 3


def test_an_exception_in_setup_is_logged_and_ends_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Api):
        def setup(self, device: str) -> None:
            raise RuntimeError("a bug")

    status = {"predict_0": WorkerSetupStatus.STARTING}
    inference_worker(Failing(), "cpu", 0, Queue(), Transport(), status, CallbackRunner(), False)  # type: ignore[arg-type]
    assert status == {"predict_0": WorkerSetupStatus.ERROR}


def test_the_stock_handler_forgets_nothing_when_its_client_gives_up() -> None:
    """Its entry in the buffer leaks, hence `gpt_serve.serve.server.Server.ask`."""

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


def test_the_stock_app_guards_health_and_answers_in_plain_text() -> None:
    """Hence an app of our own."""
    app = litserve.LitServer(Api(), accelerator="cpu").app
    guarded = {route.path for route in app.routes if getattr(route, "dependencies", None)}
    assert "/health" in guarded
    assert HTTPException not in app.exception_handlers and Request is not None
