"""LitServe's parts, put together so that a dead or hung process is always noticed.

`LitServer.run` is not used: it answers nothing while the model loads, never looks at a killed API process, and on
SIGTERM leaves its children alive. What is used: the worker process with its verbs, loop and transport.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

from litserve import LitServer

from gpt_serve.errors import GPTServeError, NotReady
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.link import Link
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.problems import by_name
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.worker import Item, Message, PredictAPI, Reply
from gpt_serve.specs import BackboneSpec

if TYPE_CHECKING:
    from gpt_serve.adapters.store import AdapterStore


class Server(LitServer):
    """One worker and the pending answers. Only the event loop's thread touches it.

    Attributes:
        config: the options.
        state: phase, admitted requests, draining.
        metrics: what ``/metrics`` shows.
        store: the adapters, checked against the backbone; None until a worker has loaded it.
        spec: the backbone's, from the worker.
        worker_ready: whether the current worker has loaded.
        worker_error: why it could not, if it said so.
    """

    def __init__(self, config: ServeConfig, api: PredictAPI) -> None:
        kind, _, index = config.device.partition(":")
        devices: Any = 1 if kind == "cpu" else [int(index or 0)]
        # timeout=False: the deadline travels with each request, see worker.py.
        super().__init__(api, accelerator=kind, devices=devices, timeout=False)  # type: ignore[arg-type]
        self.config = config
        self.api = api
        self.state = ServerState(config.queue_limit)
        self.metrics = Metrics(self.state)
        self.store: AdapterStore | None = None
        self.spec: BackboneSpec | None = None
        self.worker_ready = False
        self.worker_error: GPTServeError | None = None
        self.workers_setup_status: Any = {}  # the worker changes its own copy: messages say how it is
        self._pending: dict[int, tuple[asyncio.Future[Reply], float]] = {}  # with the time of submission
        self._numbers = count()
        self._link: Link
        self._drained: asyncio.Event

    def start_worker(self) -> SpawnProcess:
        """Spawn a worker with a link of its own."""
        self._link = link = Link()
        self.worker_ready, self.worker_error = False, None
        self._drained = asyncio.Event()
        self.litapi_request_queues[self.api.api_path] = link.requests
        self.api.transport = self._transport = link.transport
        worker: SpawnProcess = self.launch_single_inference_worker(self.api, 0)
        loop = asyncio.get_running_loop()
        link.start(partial(_call, loop, self._receive), partial(_call, loop, self._drained.set))
        return worker

    async def drained(self) -> None:
        """Wait until all that a dead worker sent was received."""
        with suppress(TimeoutError):  # a child of its own may keep the pipe open
            await asyncio.wait_for(self._drained.wait(), 5)
        self._link.close()

    def ask(self, item: Item) -> "asyncio.Future[Reply]":
        """Have the worker answer ``item``. Its future raises `NotReady` when the worker dies, see `fail_pending`."""
        number = next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[number] = future, time.monotonic()
        self._link.send((number, item))
        return future

    def fail_pending(self, reason: str) -> None:
        """Answer every pending request with `NotReady`."""
        for future, _ in self._pending.values():
            future.set_exception(NotReady(reason))
        self._pending.clear()

    def oldest_pending(self) -> float:
        """Seconds that the longest pending request has been with the worker; 0 when there is none."""
        return time.monotonic() - min(began for _, began in self._pending.values()) if self._pending else 0.0

    def close(self, worker: Any) -> None:
        """End the worker. Nothing of its needs saving, so it is killed rather than asked."""
        if worker is not None:
            self._link.close()
            worker.kill()
            worker.join()

    def _receive(self, message: Message) -> None:
        kind, content, stats = message
        if stats is not None:
            self.metrics.worker(stats, new=kind == "ready")
        if kind == "ready":
            self._take_over(content)
        elif kind == "failed":
            self.worker_error = by_name(*content)
        else:
            for number, reply in content:
                future, _ = self._pending.pop(number, (None, 0.0))
                if future is not None:
                    future.set_result(reply)

    def _take_over(self, spec: BackboneSpec) -> None:
        from gpt_serve.adapters.store import AdapterStore  # loaded by now, see Supervisor.run

        self.spec = spec
        self.store = AdapterStore(self.config.adapters, spec)
        self.worker_ready = True


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Have the event loop's thread call ``function``, if there still is a loop."""
    with suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(function, *arguments)
