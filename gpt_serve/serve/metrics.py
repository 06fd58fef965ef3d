"""What ``/metrics`` shows.

Everything is counted in the process that has the desk (the worker's numbers come along with its answers, and HTTP
processes tell what they answered), so a plain registry is exact; Prometheus's multiprocess mode would only add files
that a killed process leaves behind.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from gpt_serve.errors import NotReady
from gpt_serve.serve.messages import Stats
from gpt_serve.serve.state import ServerState

# What the bank holds now, and what it has counted, by the names of `BankStats`.
_HELD = {
    "resident": ("gpt_serve_resident_adapters", "Adapters on the device"),
    "host_resident": ("gpt_serve_host_adapters", "Adapters in host memory, ready to be copied to the device"),
    "bytes_used": ("gpt_serve_bank_used_bytes", "Memory of the bank that adapters take"),
    "bytes_total": ("gpt_serve_bank_bytes", "Memory of the bank"),
}
_COUNTED = {
    "hits": ("gpt_serve_bank_hits", "Requests whose adapter was on the device"),
    "loads": ("gpt_serve_bank_loads", "Adapters brought to the device"),
    "disk_reads": ("gpt_serve_bank_disk_reads", "Adapters read from disk"),
    "evictions": ("gpt_serve_bank_evictions", "Adapters that left the device to make room"),
    "refused": ("gpt_serve_bank_refused", "Adapter files that could not be used"),
    "load_seconds": ("gpt_serve_bank_load_seconds", "Seconds that loads took, from the file to the device"),
}
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

MOST_PAIRS = 1000
"""Pairs of task and tenant that have series of their own: thousands would cost every scrape, and Prometheus more."""
OTHER = "OTHER"  # no task's or tenant's name: those are lower case


class EngineMetrics:
    """What engines do: their passes and their banks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._batch = Histogram(
            "gpt_serve_batch_size", "Images per forward pass, one for each task", buckets=_BATCHES, registry=registry
        )
        self._pass = Histogram(
            "gpt_serve_batch_seconds", "Seconds per batch in the engine", buckets=_SECONDS, registry=registry
        )
        self._wait = Histogram(
            "gpt_serve_queue_seconds",
            "Seconds from a request's arrival at the worker to its batch, loading and decoding included",
            buckets=_SECONDS,
            registry=registry,
        )
        self._held = {key: Gauge(*texts, registry=registry) for key, texts in _HELD.items()}
        self._counted = {key: Counter(*texts, registry=registry) for key, texts in _COUNTED.items()}
        self._last: dict[int, dict[str, float]] = {}  # the numbers of each current worker

    def count(self, stats: Stats, *, new: bool, number: int = 0) -> None:
        """Count what came with a message of worker ``number``; a ``new`` one has just started, and counts from 0."""
        bank = stats.bank
        for done in stats.passes:
            self._batch.observe(len(done.waits))
            self._pass.observe(done.seconds)
            for wait in done.waits:
                self._wait.observe(wait)
        last = {} if new else self._last.get(number, {})
        self._last[number] = bank
        for key, counter in self._counted.items():
            counter.inc(bank[key] - last.get(key, 0))
        for key, gauge in self._held.items():
            gauge.set(sum(numbers[key] for numbers in self._last.values()))


class Bounded:
    """Labels of which at most `MOST_PAIRS` combinations are series of their own."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def __call__(self, *labels: str) -> tuple[str, ...]:
        """The labels, or `OTHER` for each when there are too many combinations already."""
        if labels not in self._seen and len(self._seen) >= MOST_PAIRS:
            return (OTHER,) * len(labels)
        self._seen.add(labels)
        return labels


class RequestMetrics:
    """What is asked and answered, in a registry of its own."""

    def __init__(self, state: ServerState) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "gpt_serve_requests",
            "Answers of POST /predict, one an image and task, by task (empty unless it exists), tenant and HTTP status",
            ["task", "tenant", "status"],
            registry=self.registry,
        )
        self._answers = Counter(
            "gpt_serve_answers",
            "All answers by route (empty where there is none) and HTTP status, refusals of any kind included",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "gpt_serve_request_seconds",
            "Seconds from the first header of POST /predict to its answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._bounded = Bounded()
        self._gauge("gpt_serve_in_flight", "Images, for each of their tasks, that hold a slot", lambda: state.admitted)
        self._gauge("gpt_serve_ready", "1 while requests are taken on", lambda: _is_ready(state))
        self._gauge("gpt_serve_workers_ready", "Workers that hold the backbone", lambda: state.workers_ready)
        self._gauge("gpt_serve_worker_restarts", "Workers started after the first", lambda: state.restarts)

    def answered(
        self, route: str, tenant: str, status: int, answers: Iterable[tuple[str, int]], seconds: float
    ) -> None:
        """Count a request that has its answer.

        Args:
            route: the path of the route with its placeholders; empty for what matches none.
            tenant: whose key it was, or empty.
            status: of the response.
            answers: for each image and task that was asked, the task and the status of its own answer. The task is
                empty unless it is stored: names that clients make up are endless.
            seconds: from the request's headers to the end of the answer.
        """
        self._answers.labels(route, str(status)).inc()
        if route.startswith("/predict"):
            for task, own in answers:
                self._requests.labels(*self._bounded(task, tenant), str(own)).inc()
            self._seconds.observe(seconds)

    def refused(self, status: int) -> None:
        """Count an answer to what never became a request."""
        self._answers.labels("", str(status)).inc()

    def text(self, others: Iterable[Metric] = ()) -> bytes:
        """The exposition format, with the series of ``others`` after these."""
        return generate_latest(_Joined(self.registry, others))

    def _gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        Gauge(name, help_text, registry=self.registry).set_function(value)


class Metrics(RequestMetrics):
    """Prometheus metrics of one server: its requests, and the engines of its workers."""

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self.worker = EngineMetrics(self.registry).count


class _Joined:
    """A registry and other series as one."""

    def __init__(self, registry: CollectorRegistry, others: Iterable[Metric]) -> None:
        self._registry, self._others = registry, others

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        yield from self._registry.collect()
        yield from self._others


def _is_ready(state: ServerState) -> float:
    try:
        state.check_ready()
    except NotReady:
        return 0
    return 1
