"""One replica: a backbone, a bank and a batcher, for every task."""

import asyncio
import itertools
import time
from dataclasses import replace
from queue import SimpleQueue

from ray import serve

from gpt_serve.cluster.metrics import ReplicaMetrics, Told
from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.litserve import PredictAPI
from gpt_serve.serve.messages import Answer, Failure, Item
from gpt_serve.serve.process import configure_logging
from gpt_serve.specs import BackboneSpec


class EngineReplica:
    """What the worker process of ``gpt-serve serve`` does, as an actor of Ray Serve.

    Raises:
        GPTServeError: the backbone cannot be loaded, or the adapters cannot be listed.
    """

    def __init__(self, config: ServeConfig) -> None:
        configure_logging()
        reuse_freed_memory()
        self.patience = 2 * config.deadline
        self._metrics = ReplicaMetrics()
        self._api = PredictAPI(config)
        self._api.batches = SimpleQueue()
        self._scheduler = self._api.scheduler = self._api.load(config.device)
        self._numbers = itertools.count()
        self._asked: dict[int, float] = {}  # when each item came that is not answered yet, the oldest first

    def spec(self) -> BackboneSpec:
        """Of the backbone that is loaded."""
        return self._scheduler.engine.backbone.spec

    async def answer(self, item: Item, seconds: float) -> Answer | Failure:
        """Answer within ``seconds``: clocks differ between machines, so ``item.expires`` means nothing here."""
        number = next(self._numbers)
        self._asked[number] = time.monotonic()
        try:
            future = self._api.predict(replace(item, expires=time.monotonic() + seconds))
            await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)
            reply = await asyncio.to_thread(self._api.encode_response, future, form=item.format)
            self._metrics.answered(reply, self._api.stats())
            return reply
        finally:
            del self._asked[number]

    async def metrics(self) -> Told:
        """This replica's name, and what it has counted."""
        return str(serve.get_replica_context().replica_id.unique_id), self._metrics.series()

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces a replica that raises three times: one whose engine hangs."""
        oldest = next(iter(self._asked.values()), time.monotonic())
        if time.monotonic() - oldest > self.patience:
            raise RuntimeError(f"the engine has not answered for {self.patience:.0f} s")
