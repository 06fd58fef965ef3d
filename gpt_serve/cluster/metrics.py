"""What each replica counts, and how a front shows it: the series of ``gpt-serve serve``, labelled with the replica."""

import logging
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.samples import Sample
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from gpt_serve.serve.desk import LocalDesk
from gpt_serve.serve.messages import Answer, Failure, Stats
from gpt_serve.serve.metrics import Bounded, EngineMetrics

logger = logging.getLogger("gpt_serve.cluster")

PATIENCE = 2.0  # seconds for all replicas to tell
Told = tuple[str, list[Metric]]  # by a replica: its name and its series


class ReplicaMetrics:
    """What one replica answers and how its engine does."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = EngineMetrics(self._registry)
        self._bounded = Bounded()
        self._answers = Counter(
            "gpt_serve_replica_answers", "Predictions of a replica by task", ["task"], registry=self._registry
        )
        self._failures = Counter(
            "gpt_serve_replica_failures",
            "What a replica could not predict, by the name of the error",
            ["error"],
            registry=self._registry,
        )

    def answered(self, reply: Answer | Failure, stats: Stats) -> None:
        """Count a reply, and what the engine did since the last one."""
        if isinstance(reply, Answer):
            self._answers.labels(*self._bounded(reply.task)).inc()
        else:  # its task may be a name that the client has made up: those are endless
            self._failures.labels(reply.name).inc()
        self._engine.count(stats, new=False)

    def series(self) -> list[Metric]:
        """All of it, as plain data."""
        return list(self._registry.collect())


class ClusterDesk(LocalDesk):
    """The desk of a front, whose metrics are those of its requests and of all replicas.

    Attributes:
        handle: of the replicas, by Ray Serve.
    """

    handle: Any

    async def scrape(self) -> bytes:
        """The metrics as they are now; replicas that do not tell in time are left out."""
        return bytes(await self.read(self.metrics.text, joined(await self._told())))

    async def _told(self) -> list[Told]:
        try:
            told = await self.handle.broadcast("metrics").results_async(timeout_s=PATIENCE, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException) as error:  # there may be none just now
            logger.warning("no metrics of replicas: %s", type(error).__name__)
            return []
        return [each for each in told if not isinstance(each, BaseException)]


def joined(told: Iterable[Told]) -> list[Metric]:
    """The series of all replicas, one family for each name, with the label ``replica``; and how many have told."""
    families: dict[str, Metric] = {}
    names = []
    for replica, series in told:
        names.append(replica)
        for one in series:
            family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
            family.samples += [_of(sample, replica) for sample in one.samples]
    count = GaugeMetricFamily("gpt_serve_replicas", "Replicas that told their metrics", value=len(names))
    return [count, *families.values()]


def _of(sample: Sample, replica: str) -> Sample:
    return sample._replace(labels={**sample.labels, "replica": replica})
