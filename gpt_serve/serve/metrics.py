"""What ``/metrics`` shows.

Everything is counted in the API process (the worker's numbers come along with its answers), so a plain registry is
exact; Prometheus's multiprocess mode would only add files that a killed worker leaves behind.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gpt_serve.errors import NotReady
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.worker import Stats

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self, state: ServerState) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "gpt_serve_requests",
            "Answers of POST /predict by task (empty unless such a task exists) and HTTP status",
            ["task", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "gpt_serve_request_seconds",
            "Seconds from the first header of POST /predict to its answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram(
            "gpt_serve_batch_size", "Images per forward pass", buckets=_BATCHES, registry=self.registry
        )
        self._engine = Histogram(
            "gpt_serve_batch_seconds",
            "Seconds per batch in the engine, decoding included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._resident = Gauge("gpt_serve_resident_adapters", "Adapters on the device", registry=self.registry)
        self._gauge("gpt_serve_in_flight", "Requests that hold an admission slot", lambda: state.admitted)
        self._gauge("gpt_serve_ready", "1 while requests are taken on", lambda: _is_ready(state))
        self._gauge("gpt_serve_worker_restarts", "Workers started after the first", lambda: state.restarts)

    def answered(self, task: str, status: int, seconds: float) -> None:
        """Count one answer. ``task`` must be a stored task's name or empty: names that clients make up are endless."""
        self._requests.labels(task, str(status)).inc()
        self._seconds.observe(seconds)

    def batch(self, stats: Stats | None) -> None:
        """Count a batch, if ``stats`` came with this reply."""
        if stats is not None:
            size, seconds, resident = stats
            self._batch.observe(size)
            self._engine.observe(seconds)
            self._resident.set(resident)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        Gauge(name, help_text, registry=self.registry).set_function(value)


def _is_ready(state: ServerState) -> float:
    try:
        state.check_ready()
    except NotReady:
        return 0
    return 1
