"""A Ray cluster of several nodes on this machine: the same interface, and a node that is killed under clients."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cluster.app import ENGINE, NAME, PROXIES, ClusterConfig, application
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from gpt_serve.serve.config import ServeConfig
from tests.factories import make_adapter
from tests.serve.conftest import encode
from tests.serve.harness import free_port, until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Ray, in its threads

START_SECONDS = 180
URL = ""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, bundled: Backbone) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed in range(6):
        AdapterStore(root).publish(make_adapter(bundled.spec, f"task-{seed}", seed=seed))
    return root


@pytest.fixture(scope="module")
def cluster(adapters: Path) -> Iterator[Cluster]:
    """A head node without a core for replicas, and two nodes with one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    port = free_port()
    global URL
    URL = f"http://127.0.0.1:{port}"
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location=PROXIES)
    config = ServeConfig(adapters=adapters, engine="torch", max_batch_size=8, deadline=120)
    serve.run(application(config, ClusterConfig(min_replicas=2, max_replicas=2)), name=NAME, route_prefix="/")
    yield cluster
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def replicas() -> int:
    """How many replicas run now."""
    states = serve.status().applications[NAME].deployments[ENGINE].replica_states
    return states.get("RUNNING", 0)


def predict(client: httpx.Client, task: str, image: bytes) -> httpx.Response:
    return client.post(f"{URL}/predict", data={"task": task}, files={"image": ("image", image)})


def test_the_interface_is_that_of_a_single_machine(cluster: Cluster, adapters: Path, bundled: Backbone) -> None:
    engine = Engine(bundled, AdapterStore(adapters))
    image = encode(0)
    with httpx.Client(timeout=120) as client:
        for seed in range(6):
            answer = predict(client, f"task-{seed}", image).json()
            (expected,) = engine.predict([(f"task-{seed}", image)])
            assert answer["revision"] == expected.revision
            shown = [(best["label"], best["probability"]) for best in answer["predictions"]]
            assert [label for label, _ in shown] == [label for label, _ in expected.top(5)]
            assert [value for _, value in shown] == pytest.approx([value for _, value in expected.top(5)], abs=1e-5)
        assert len(client.get(f"{URL}/tasks").json()["tasks"]) == 6
        assert client.get(f"{URL}/ready").json()["backbone_sha256"] == bundled.fingerprint
        counted = re.findall(r"^gpt_serve_replica_answers_total{(.*)} 1.0", metrics(client), re.MULTILINE)
        assert len(counted) == 6 and all("replica=" in labels for labels in counted)
        assert "gpt_serve_replicas 2.0" in metrics(client)
        for response, status in (
            (predict(client, "nobody", image), 404),
            (predict(client, "task-0", b"junk"), 415),
            (predict(client, "task-0", image[:200]), 422),
            (client.post(f"{URL}/predict", files={"image": ("image", image)}), 400),
        ):
            assert response.status_code == status
            assert response.headers["content-type"].startswith("application/problem+json")


def metrics(client: httpx.Client) -> str:
    return client.get(f"{URL}/metrics").text


class Sender(threading.Thread):
    """Sends one request after another, and keeps the status and the body of each."""

    def __init__(self, number: int, image: bytes) -> None:
        super().__init__()
        self.number, self.image = number, image
        self.stopped = threading.Event()
        self.results: list[tuple[int, Any]] = []

    def run(self) -> None:
        with httpx.Client(timeout=120) as client:
            while not self.stopped.is_set():
                task = f"task-{(self.number + len(self.results)) % 6}"
                response = predict(client, task, self.image)
                self.results.append((response.status_code, response.json()))


def test_a_node_that_is_killed_under_clients_loses_no_answer(
    cluster: Cluster, adapters: Path, bundled: Backbone
) -> None:
    engine, image = Engine(bundled, AdapterStore(adapters)), encode(1)
    expected = {f"task-{seed}": engine.predict([(f"task-{seed}", image)])[0] for seed in range(6)}
    senders = [Sender(number, image) for number in range(16)]
    for sender in senders:
        sender.start()
    try:
        until(lambda: sum(len(sender.results) for sender in senders) > 100, START_SECONDS)
        victim = next(node for node in cluster.worker_nodes)
        cluster.remove_node(victim, allow_graceful=False)  # SIGKILL of all its processes
        killed, sent = time.monotonic(), sum(len(sender.results) for sender in senders)
        until(lambda: sum(len(sender.results) for sender in senders) > sent + 100, START_SECONDS)
        cluster.add_node(num_cpus=1)
        until(lambda: replicas() == 2, START_SECONDS)
        print(f"two replicas again {time.monotonic() - killed:.0f} s after the kill")
    finally:
        for sender in senders:
            sender.stopped.set()
        for sender in senders:
            sender.join()
    for status, answer in (result for sender in senders for result in sender.results):
        assert status == 200, answer
        best = expected[answer["task"]].top(1)[0]
        assert answer["revision"] == expected[answer["task"]].revision
        assert answer["predictions"][0]["label"] == best[0]
        assert answer["predictions"][0]["probability"] == pytest.approx(best[1], abs=1e-5)
