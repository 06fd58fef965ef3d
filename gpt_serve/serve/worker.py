"""The worker process: LitServe's verbs around one `Scheduler`.

Everything on the pipes is built of plain Python values. This module stays free of torch, so that the parent can spawn
the worker at once.
"""

import logging
import re
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from litserve import LitAPI
from litserve.loops.base import LitLoop
from litserve.transport.base import MessageTransport

from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.errors import GPTServeError
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.link import take_all
from gpt_serve.serve.process import configure_logging, end_child, guard_child

if TYPE_CHECKING:
    from gpt_serve.engine.engine import Engine, Prediction
    from gpt_serve.engine.scheduler import Batch, Scheduler

logger = logging.getLogger("gpt_serve.serve")

CONSUMER = 0  # LitServe numbers its API processes; here it is the only one

# task, image file, top_k, time.monotonic() when nobody waits any more
Item = tuple[str, bytes, int, float]
# name of an error class or "", the error's message or the answer
Reply = tuple[str, Any]
# passes since the last message: seconds and each row's wait before it; what the bank's numbers are now
Stats = tuple[list[tuple[float, tuple[float, ...]]], dict[str, float]]
# "ready" with a BackboneSpec, "failed" with a Reply, or "answers" with a list of (number of the request, Reply)
Message = tuple[str, Any, Stats | None]


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
        answered: SimpleQueue[tuple[int, int, Future[Prediction]]] = SimpleQueue()
        Thread(target=self.answer, args=(lit_api, transport, answered), name="answers", daemon=True).start()
        while True:
            try:
                items = request_queue.recv()
            except (EOFError, OSError):
                end_child()  # the server is gone
            for uid, item in items:
                lit_api.predict(item).add_done_callback(partial(_put, answered, uid, item[2]))

    def answer(self, lit_api: "PredictAPI", transport: MessageTransport, answered: "SimpleQueue[Any]") -> None:
        """Send what is answered, all that is there in one message."""
        while True:
            futures = take_all(answered)
            answers = [(uid, lit_api.encode_response(future, top_k=top_k)) for uid, top_k, future in futures]
            try:
                transport.send(("answers", answers, lit_api.stats()), CONSUMER)
            except OSError:
                end_child()  # the server is gone


class PredictAPI(LitAPI):
    """Answers `Item`s with `Reply`s; errors travel as values.

    Attributes:
        transport: to the server, which waits for a message "ready" or "failed".
        scheduler: what does the work, from `setup` on.
    """

    transport: MessageTransport
    scheduler: "Scheduler"

    def __init__(self, config: ServeConfig) -> None:
        loop = StreamLoop()  # type: ignore[no-untyped-call]
        super().__init__(max_batch_size=config.max_batch_size, batch_timeout=config.batch_timeout, loop=loop)
        self.config = config
        self.batches: SimpleQueue[Batch] | None = None

    def setup(self, device: str) -> None:
        """Load the backbone and run it once; a deliberate error ends the process without a traceback."""
        guard_child()
        reuse_freed_memory()
        configure_logging()
        from gpt_serve.engine.scheduler import Scheduler  # after the guard: it takes seconds

        try:
            engine = _load_engine(self.config, device)
        except GPTServeError as error:
            self.transport.send(("failed", _error(error), None), CONSUMER)
            end_child()
        self.batches = SimpleQueue()
        self.scheduler = Scheduler(
            engine,
            max_batch=self.config.max_batch_size,
            batch_timeout=self.config.batch_timeout,
            overlap=device != "cpu",
            on_batch=self.batches.put,
            on_error=report,
        )
        self.transport.send(("ready", engine.backbone.spec, self.stats()), CONSUMER)

    def predict(self, x: Item, **_: Any) -> "Future[Prediction]":
        """What will hold the answer."""
        task, image, _top_k, expires = x
        return self.scheduler.submit(task, image, expires)

    def encode_response(self, output: "Future[Prediction]", *, top_k: int = 1, **_: Any) -> Reply:
        """The answer, or the error, of a future that is done."""
        error = output.exception()
        if error is not None:
            return _error(error)
        result = output.result()
        best = [{"label": label, "probability": probability} for label, probability in result.top(top_k)]
        return "", {"task": result.task, "revision": result.revision, "predictions": best}

    def stats(self) -> Stats:
        """For one message, so that every pass is counted once."""
        assert self.batches is not None
        batches = [self.batches.get_nowait() for _ in range(self.batches.qsize())]
        bank = self.scheduler.engine.bank.stats()
        return [(batch.seconds, batch.waits) for batch in batches], asdict(bank)


def _load_engine(config: ServeConfig, device: str) -> "Engine":
    """The engine that ``config`` describes; only the worker process imports torch."""
    from gpt_serve.engine.build import build_engine
    from gpt_serve.images.decode import ImageLimits
    from gpt_serve.model.backbone import Backbone

    backbone = Backbone.load(config.backbone, checkpoint=config.checkpoint, input_size=config.input_size, device=device)
    return build_engine(
        backbone,
        config.adapters,
        precision=config.precision,
        onnx=config.chosen_engine == "onnx",
        compiled=config.compile,
        bank_bytes=config.bank_bytes,
        host_bytes=config.host_bytes,
        limits=ImageLimits(max_bytes=config.max_body_bytes, max_pixels=config.max_pixels),
        max_batch=config.max_batch_size,
    )


def report(error: Exception) -> None:
    """Log what should not happen; end the process when only another one gets a working device again."""
    logger.error("a request failed: %s", error, exc_info=error)
    if _device_is_lost(error):
        end_child()


def _put(answered: "SimpleQueue[Any]", uid: int, top_k: int, future: "Future[Prediction]") -> None:
    answered.put((uid, top_k, future))


def _device_is_lost(error: Exception) -> bool:
    """Whether this process's CUDA context is broken for good; onnxruntime says so by code, 2 being out of memory."""
    import torch

    return isinstance(error, torch.AcceleratorError) or bool(re.search(r"CUDA failure (?!2:)", str(error)))


def _error(error: BaseException) -> Reply:
    return type(error).__name__, str(error)
