"""The worker process: LitServe's verbs around one `Engine`.

Everything on the queues is built of plain Python values, because LitServe's manager process unpickles it on the way.
This module stays free of torch, so that the parent can spawn the worker at once.
"""

import logging
import pickle
import queue
import re
import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from litserve import LitAPI
from litserve.loops.simple_loops import BatchedLoop
from litserve.transport.base import MessageTransport

from gpt_serve.errors import GPTServeError
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.process import configure_logging, end_child, guard_child

if TYPE_CHECKING:
    from gpt_serve.engine import Engine, Prediction

logger = logging.getLogger("gpt_serve.serve")

# task, image file, top_k, time.monotonic() when nobody waits any more
Item = tuple[str, bytes, int, float]
# batch size, seconds in the engine, adapters on the device; only with the first reply of a batch
Stats = tuple[int, float, int]
# name of an error class or "", the error's message or the answer, stats
Reply = tuple[str, Any, Stats | None]


class WaitingLoop(BatchedLoop):
    """LitServe's batched loop, except that it sleeps while there is nothing to do.

    The stock loop polls the queue every millisecond, and its window opens before the first request arrives. Here the
    window opens with the first request, and whatever has queued up meanwhile is taken without waiting.
    """

    def get_batch_requests(
        self, lit_api: LitAPI, request_queue: Any, transport: MessageTransport
    ) -> tuple[list[tuple[int, str, Any]], list[tuple[int, str]]]:
        """Up to ``max_batch_size`` requests as (consumer, uid, payload); timed-out ones are left to `predict`."""
        taken: list[tuple[int, str, Any]] = []
        wait, closes = 1.0, 0.0
        try:
            while len(taken) < lit_api.max_batch_size:
                consumer, uid, _, payload = request_queue.get(timeout=wait)
                closes = closes or time.monotonic() + lit_api.batch_timeout
                taken.append((consumer, uid, payload))
                wait = max(0.0, closes - time.monotonic())
        except queue.Empty:
            pass
        except (EOFError, OSError):
            end_child()  # the queues are gone
        return taken, []


class PredictAPI(LitAPI):
    """Answers lists of `Item` with lists of `Reply`; errors travel as values, so no item disturbs another.

    ``board`` is a dictionary shared with the parent: the worker writes ``spec`` (a pickled `BackboneSpec`) when the
    backbone is loaded, or ``error`` (class name, message) when it cannot be.
    """

    board: MutableMapping[str, Any]
    engine: "Engine"

    def __init__(self, config: ServeConfig) -> None:
        loop = WaitingLoop()  # type: ignore[no-untyped-call]
        super().__init__(max_batch_size=config.max_batch_size, batch_timeout=config.batch_timeout, loop=loop)
        self.config = config

    def setup(self, device: str) -> None:
        """Load the backbone and run it once; a deliberate error ends the process without a traceback."""
        guard_child()
        configure_logging()
        from gpt_serve.serve.loading import load_engine  # after the guard: it takes seconds

        try:
            self.engine, spec = load_engine(self.config, device)
        except GPTServeError as error:
            self.board["error"] = (type(error).__name__, str(error))
            end_child()
        self.board["spec"] = pickle.dumps(spec)

    def predict(self, x: list[Item], **_: Any) -> list[Reply]:
        """One reply per item, in order."""
        started, now = time.perf_counter(), time.monotonic()
        live = [i for i, item in enumerate(x) if item[3] > now]
        replies: list[Reply] = [("DeadlineExceeded", "the deadline passed while the request was queued", None)] * len(x)
        for i, result in zip(live, self._predict([(x[i][0], x[i][1]) for i in live]), strict=True):
            replies[i] = _reply(result, x[i][2])
        kind, value, _stats = replies[0]
        replies[0] = (kind, value, (len(live), time.perf_counter() - started, len(self.engine.bank)))
        return replies

    def _predict(self, requests: list[tuple[str, bytes]]) -> "list[Prediction | GPTServeError]":
        """The engine's results; should a batch break it, each request alone, so that only the culprit fails."""
        if not requests:
            return []
        try:
            return self.engine.predict(requests)
        except Exception as error:
            logger.exception("a batch of %d failed", len(requests))
            if _device_is_lost(error):
                end_child()  # only a new process gets a working device again
            if len(requests) == 1:
                return [GPTServeError(f"{type(error).__name__} in the engine")]
            return [self._predict([request])[0] for request in requests]


def _device_is_lost(error: Exception) -> bool:
    """Whether this process's CUDA context is broken for good; onnxruntime says so by code, 2 being out of memory."""
    import torch

    return isinstance(error, torch.AcceleratorError) or bool(re.search(r"CUDA failure (?!2:)", str(error)))


def _reply(result: "Prediction | GPTServeError", top_k: int) -> Reply:
    if isinstance(result, GPTServeError):
        return type(result).__name__, str(result), None
    best = [{"label": label, "probability": probability} for label, probability in result.top(top_k)]
    return "", {"task": result.task, "revision": result.revision, "predictions": best}, None
