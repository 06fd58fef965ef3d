"""A Ray cluster of several nodes on this machine, what is served on it, and clients that check every answer."""

import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socket import create_server
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from gpt_serve.bench.http import BOUNDARY, form
from gpt_serve.bench.setting import photo
from gpt_serve.cluster.app import ENGINE, NAME, PROXIES, ClusterConfig, application
from gpt_serve.serve.config import ServeConfig

PATIENCE = 180  # seconds for replicas to come
Check = Callable[[str, int, dict[str, Any]], str]
"""What is wrong with an answer, given the task that was asked, the status and the body; empty if nothing is."""


@contextmanager
def nodes(count: int) -> Iterator[int]:
    """A head without a core, ``count`` nodes with one core each, and Ray Serve on a port, which is given."""
    with create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location=PROXIES)
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def deploy(config: ServeConfig, replicas: int, name: str = NAME, prefix: str = "/") -> float:
    """Start or change an application, and wait until it runs so many replicas; how many seconds that took."""
    began = time.monotonic()
    serve.run(application(config, ClusterConfig(replicas, replicas)), name=name, route_prefix=prefix)
    while running(name) != {"RUNNING": replicas}:
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"there are {running(name)}, not {replicas} replicas")
        time.sleep(0.1)
    return time.monotonic() - began


def running(name: str = NAME) -> dict[str, int]:
    """How many replicas are in each state."""
    states = serve.status().applications[name].deployments[ENGINE].replica_states
    return {getattr(state, "value", state): count for state, count in states.items() if count}


def zipf(tasks: Sequence[str], seed: int, exponent: float = 1.0) -> Iterator[str]:
    """Tasks without end, the first most often."""
    drawn = random.Random(seed)
    weights = list(itertools.accumulate(1 / rank**exponent for rank in range(1, len(tasks) + 1)))
    while True:
        yield from drawn.choices(tasks, cum_weights=weights, k=1000)


@dataclass
class Clients:
    """Threads that each ask, wait for the answer, and ask again, until the block ends.

    Attributes:
        port: of 127.0.0.1.
        tasks: gives the tasks that client number N asks for.
        check: see `Check`.
        count: how many there are.
        prefix: of the path.
        image: what all ask about.
        wrong: what was wrong with answers.
        statuses: how many answers there were of each status; 0 for a connection that broke.
        seconds: that answers took.
    """

    port: int
    tasks: Callable[[int], Iterator[str]]
    check: Check
    count: int = 16
    prefix: str = ""
    image: bytes = field(default_factory=lambda: photo(0))
    wrong: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def __enter__(self) -> "Clients":
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        for task in self.tasks(number):
            if self._ended.is_set():
                break
            self._ask(connection, task)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, task: str) -> None:
        began = time.perf_counter()
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        try:
            connection.request("POST", f"{self.prefix}/predict", form(task, self.image), headers)
            response = connection.getresponse()
            status, body = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.statuses[0] += 1
            self.wrong[f"no answer: {type(error).__name__}"] += 1
            with suppress(OSError):
                connection.close()
            return
        self.seconds.append(time.perf_counter() - began)
        self.statuses[status] += 1
        if problem := self.check(task, status, body):
            self.wrong[problem] += 1
