"""The worker process as the HTTP side sees it: asked for answers, started again when it died."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing.context import SpawnProcess

from gpt_serve.errors import GPTServeError, NotReady
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.link import Link
from gpt_serve.serve.messages import Answer, Answered, Asked, Beat, Failure, Item, Message, Ready
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.process import holding_signals
from gpt_serve.serve.state import Phase, ServerState


class Server:
    """One worker and the answers that it owes. Only the event loop's thread touches it.

    Args:
        config: the options.
        launch: spawns a worker at the other end of a link.
        state: phase, backbone, admitted requests, draining; of all workers together.
        metrics: what ``/metrics`` shows; of all workers together.
        number: tells the workers apart.

    Attributes:
        phase: what the worker is doing.
        worker_ready: whether the current worker has loaded.
        worker_error: why it could not, if it said so.
    """

    def __init__(
        self,
        config: ServeConfig,
        launch: Callable[[Link], SpawnProcess],
        state: ServerState,
        metrics: Metrics,
        number: int = 0,
    ) -> None:
        self.config = config
        self.state = state
        self.metrics = metrics
        self.number = number
        self.phase: Phase = "loading"
        self.enter(self.phase)
        self.worker_ready = False
        self.worker_error: GPTServeError | None = None
        self._launch = launch
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._beat = Beat(0.0)
        self._beat_at = 0.0
        self._numbers = count()
        self._link: Link
        self._drained: asyncio.Event

    async def start_worker(self) -> SpawnProcess:
        """Spawn a worker with a link of its own. Raises `OSError` where that cannot be had just now."""
        self._link = link = Link()
        self.worker_ready, self.worker_error = False, None
        self._drained = asyncio.Event()
        with holding_signals():
            worker = self._launch(link)
        await link.start(self._receive, self._drained.set)
        return worker

    async def drained(self) -> None:
        """Wait until all that a dead worker sent was received."""
        with suppress(TimeoutError):  # a child of its own may keep the socket open
            await asyncio.wait_for(self._drained.wait(), 5)
        self._link.close()

    @property
    def owed(self) -> int:
        """How many answers the worker owes."""
        return len(self._pending)

    def enter(self, phase: Phase) -> None:
        """The worker enters a phase."""
        self.phase = phase
        self.state.enter(self.number, phase)

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        """Have the worker answer ``item``. Its future raises `NotReady` when the worker dies, see `fail_pending`."""
        number = next(self._numbers)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        future.add_done_callback(partial(self._done, number))
        self._link.send(Asked(number, item))
        return future

    def fail_pending(self, reason: str) -> None:
        """Answer every pending request with `NotReady`."""
        for future in self._pending.values():
            if not future.done():
                future.set_exception(NotReady(reason))

    def stuck(self) -> float:
        """Seconds for which one piece of the worker's work has been under way, or the worker has been silent."""
        return self._beat.busy + time.monotonic() - self._beat_at if self.worker_ready else 0.0

    def close(self, worker: SpawnProcess | None) -> None:
        """End the worker. It holds nothing that must be saved, so it is killed rather than asked."""
        if worker is not None:
            worker.kill()
            worker.join()

    def _done(self, number: int, future: "asyncio.Future[Answer]") -> None:
        del self._pending[number]
        if future.cancelled():
            self._link.send(Asked(number, None))

    def _receive(self, message: Message) -> None:
        if isinstance(message, Failure):
            self.worker_error = message.error()
        elif isinstance(message, Beat):
            self._beat, self._beat_at = message, time.monotonic()
        else:
            self.metrics.worker(message.stats, new=isinstance(message, Ready), number=self.number)
            if isinstance(message, Ready):
                self.state.spec = message.spec
                self._beat, self._beat_at = Beat(0.0), time.monotonic()
                self.worker_ready = True
            else:
                self._settle(message)

    def _settle(self, message: Answered) -> None:
        for number, reply in message.replies:
            future = self._pending.get(number)
            if future is None or future.done():
                continue
            if isinstance(reply, Failure):
                future.set_exception(reply.error())
            else:
                future.set_result(reply)
