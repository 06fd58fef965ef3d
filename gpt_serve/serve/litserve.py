"""Everything that is LitServe's: the worker process, its verbs around one `Scheduler`, and how it is started.

No other module imports LitServe. ``LitServer.run`` is not used: it answers nothing while the model loads, never looks
at a killed process, and on SIGTERM leaves its children alive. What is used is the worker process with its verbs, its
loop and its transport. This module stays free of torch, so that the parent can spawn the worker at once.
"""

import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from litserve import LitAPI, LitServer
from litserve.loops.base import LitLoop
from litserve.transport.base import MessageTransport

from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.errors import DeadlineExceeded, GPTServeError
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.link import Link, take_all
from gpt_serve.serve.messages import Answer, Answered, Asked, Beat, Failure, Format, Item, Message, Passed, Ready, Stats
from gpt_serve.serve.process import configure_logging, end_child, guard_child

if TYPE_CHECKING:
    from gpt_serve.engine.engine import Engine, Success
    from gpt_serve.engine.looker import Look, Looker
    from gpt_serve.engine.scheduler import Batch, Scheduler

logger = logging.getLogger("gpt_serve.serve")

ENCODERS = 2  # threads for what takes long to encode: a mask has as many pixels as its image
BEAT = 1.0  # seconds between two signs of life
CONSUMER = 0  # LitServe numbers its API processes; here it is the only one


class PipeTransport(MessageTransport):
    """A worker's way to the server; safe to share between threads."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.connection = connection
        self._lock: Lock | None = None  # made by its first user: a lock cannot be sent to the worker

    def send(self, item: Message, consumer_id: int) -> None:
        """Send a message; there is one consumer."""
        self._lock = self._lock or Lock()
        with self._lock:
            self.connection.send(item)

    async def areceive(self, timeout: int | None = None, consumer_id: int | None = None) -> Any:
        """The server's side is `Link`."""
        raise NotImplementedError


class StreamLoop(LitLoop):
    """Takes requests as they come, and sends each answer as soon as it is there; sleeps while there is nothing to do.

    LitServe's batched loop polls, and takes the next requests only when the last batch is answered.
    """

    def __call__(
        self,
        lit_api: Any,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: MessageTransport,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Runs for ever; ``request_queue`` and ``transport`` are the link's."""
        answered: SimpleQueue[tuple[int, Callable[[], Answer | Failure]]] = SimpleQueue()
        Thread(target=self.answer, args=(lit_api, transport, answered), name="answers", daemon=True).start()
        Thread(target=self.beat, args=(lit_api, transport), name="beats", daemon=True).start()
        asked: dict[int, Future[Success]] = {}
        while True:
            try:
                batch: list[Asked] = request_queue.recv()
            except (EOFError, OSError):
                end_child()  # the server is gone
            for one in batch:
                if one.item is None:
                    lit_api.abandon(asked.get(one.number))
                    continue
                future = asked[one.number] = lit_api.predict(one.item)
                future.add_done_callback(partial(_put, lit_api, answered, asked, one))

    def beat(self, lit_api: "PredictAPI", transport: MessageTransport) -> None:
        """Tell the server again and again that this process runs, and how long its work has been taking."""
        while True:
            time.sleep(BEAT)
            try:
                transport.send(Beat(lit_api.scheduler.busy()), CONSUMER)
            except OSError:
                end_child()  # the server is gone

    def answer(self, lit_api: "PredictAPI", transport: MessageTransport, answered: "SimpleQueue[Any]") -> None:
        """Send what is answered, all that is there in one message."""
        while True:
            replies = [(number, encoded()) for number, encoded in take_all(answered)]
            try:
                transport.send(Answered(replies, lit_api.stats()), CONSUMER)
            except OSError:
                end_child()  # the server is gone


class PredictAPI(LitAPI):
    """Answers each `Item` with an `Answer` or a `Failure`; errors travel as values.

    Attributes:
        transport: to the server, which waits for `Ready` or a `Failure`.
        scheduler: what does the work, from `setup` on.
    """

    transport: MessageTransport
    scheduler: "Scheduler"

    def __init__(self, config: ServeConfig) -> None:
        loop = StreamLoop()  # type: ignore[no-untyped-call]
        super().__init__(max_batch_size=config.max_batch_size, batch_timeout=config.batch_timeout, loop=loop)
        self.config = config
        self.batches: SimpleQueue[Batch] | None = None
        self.encoders: ThreadPoolExecutor
        self._looks: set[Future[Look]] = set()  # that are not drawn yet

    def setup(self, device: str) -> None:
        """Load the backbone and run it once; a deliberate error ends the process without a traceback."""
        guard_child()
        reuse_freed_memory()
        configure_logging()
        self.batches = SimpleQueue()
        try:
            self.scheduler = self.load(device)
        except GPTServeError as error:
            self.transport.send(Failure.of(error), CONSUMER)
            end_child()
        import_module("gpt_serve.serve.encode")  # or the first answers would wait for it
        self.transport.send(Ready(self.scheduler.engine.backbone.spec, self.stats()), CONSUMER)

    def load(self, device: str) -> "Scheduler":
        """What will do the work, ready for it. Raises a `GPTServeError` where there is no such backbone or device."""
        from gpt_serve.engine.scheduler import Scheduler  # not before the guard: torch takes seconds to import

        assert self.batches is not None
        self.encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        return Scheduler(
            _load_engine(self.config, device),
            max_batch=self.config.max_batch_size,
            batch_timeout=self.config.batch_timeout,
            overlap=device != "cpu",
            on_batch=self.batches.put,
            on_error=report,
        )

    @cached_property
    def looker(self) -> "Looker":
        """Draws attention; made when somebody wants to see some."""
        from gpt_serve.engine.looker import Looker

        engine = self.scheduler.engine
        return Looker(engine.backbone, engine.bank.store, engine.limits, report)

    def predict(self, x: Item, **_: Any) -> "Future[Any]":
        """The future that will hold the prediction for ``x``, or the picture, or its error."""
        if x.attention:
            look = self.looker.submit(x.task, x.image, x.expires)
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)
            return look
        return self.scheduler.submit(x.task, x.image, x.expires, x.tenant)

    def abandon(self, output: "Future[Any] | None") -> None:
        """Nobody waits any more for ``output``, which is None if it was answered already."""
        if output in self._looks:
            output.cancel()
        elif output is not None:
            self.scheduler.abandon(output)

    def encode_response(self, output: "Future[Any]", *, form: Format | None = None, **_: Any) -> Answer | Failure:
        """The answer, or the error, of a future that is done."""
        from gpt_serve.serve.encode import encode

        if output.cancelled():
            return Failure.of(DeadlineExceeded("nobody waited any more"))
        error = output.exception()
        if error is not None:
            return Failure.of(error)
        try:
            seconds = getattr(output, "seconds", {})  # a scheduler's, see `gpt_serve.engine.scheduler.jobs.Pending`
            return encode(output.result(), form or Format(), seconds)
        except GPTServeError as refusal:
            return Failure.of(refusal)
        except Exception as bug:  # of one answer: the thread that sends them all must go on
            report(bug)
            return Failure.of(bug)

    def stats(self) -> Stats:
        """The numbers for one message: every pass is in one of them, and only in one."""
        assert self.batches is not None
        batches = [self.batches.get_nowait() for _ in range(self.batches.qsize())]
        passes = [Passed(batch.seconds, batch.waits) for batch in batches]
        return Stats(asdict(self.scheduler.engine.bank.stats()), passes)


class Launcher:
    """Starts worker processes the way that LitServe does.

    Args:
        config: the options; they say which device the worker gets.
        api: what the worker runs.
    """

    def __init__(self, config: ServeConfig, api: PredictAPI) -> None:
        kind, _, index = config.device.partition(":")
        devices: Any = 1 if kind == "cpu" else [int(index or 0)]
        # timeout=False: the deadline travels with each item.
        self._server = LitServer(api, accelerator=kind, devices=devices, timeout=False)  # type: ignore[arg-type]
        self._server.workers_setup_status = {}  # type: ignore[assignment]  # the worker changes its own copy: messages say how it is
        self._api = api

    def start(self, link: Link) -> SpawnProcess:
        """Spawn a worker at the other end of ``link``; call `Link.start` next."""
        transport = PipeTransport(link.worker)
        self._api.transport = self._server._transport = transport
        self._server.litapi_request_queues[self._api.api_path] = link.worker
        worker: SpawnProcess = self._server.launch_single_inference_worker(self._api, 0)
        return worker


def _load_engine(config: ServeConfig, device: str) -> "Engine":
    """The engine that ``config`` describes; only the worker process imports torch."""
    from gpt_serve.adapters.store import AdapterStore
    from gpt_serve.engine.build import build_engine
    from gpt_serve.images.decode import ImageLimits
    from gpt_serve.model.backbone import Backbone

    backbone = Backbone.load(config.backbone, checkpoint=config.checkpoint, input_size=config.input_size, device=device)
    return build_engine(
        backbone,
        AdapterStore(config.adapters, backbone.spec, poll_seconds=config.poll_seconds),
        precision=config.precision,
        onnx=config.chosen_engine == "onnx",
        compiled=config.compile,
        bank_bytes=config.bank_bytes,
        host_bytes=config.host_bytes,
        trunk_cache_bytes=config.trunk_cache_bytes,
        limits=ImageLimits(max_bytes=config.max_body_bytes, max_pixels=config.max_pixels),
        max_batch=config.max_batch_size,
    )


def report(error: Exception) -> None:
    """Log what should not happen; end the process when only another one gets a working device again."""
    logger.error("a request failed: %s", error, exc_info=error)
    if _device_is_lost(error):
        end_child()


def _put(
    api: PredictAPI,
    answered: "SimpleQueue[Any]",
    asked: "dict[int, Future[Success]]",
    one: Asked,
    future: "Future[Success]",
) -> None:
    """Have the answers sent, by the thread that sends them, or later where it would hold up the others."""
    from gpt_serve.serve.encode import is_mask

    asked.pop(one.number, None)
    assert one.item is not None
    encode = partial(api.encode_response, future, form=one.item.format)
    if future.exception() is None and is_mask(future.result()):
        api.encoders.submit(_encode_and_put, answered, one, encode)
    else:
        answered.put((one.number, encode))


def _encode_and_put(answered: "SimpleQueue[Any]", one: Asked, encode: "Callable[[], Answer | Failure]") -> None:
    assert one.item is not None
    late = one.item.expires <= time.monotonic()
    reply = Failure.of(DeadlineExceeded("the deadline passed before the mask was made")) if late else encode()
    answered.put((one.number, lambda: reply))


def _device_is_lost(error: Exception) -> bool:
    """Whether this process's CUDA context is broken for good; onnxruntime says so by code, 2 being out of memory."""
    import torch

    return isinstance(error, torch.AcceleratorError) or bool(re.search(r"CUDA failure (?!2:)", str(error)))
