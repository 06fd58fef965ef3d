"""What runs on Ray, without a cluster: routing, asking again, health, files."""

import asyncio
import os
import pickle
import re
import signal
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from gpt_serve.cli.main import main
from gpt_serve.cluster import run
from gpt_serve.cluster.app import ClusterConfig, application, engine_options, from_args, to_args
from gpt_serve.cluster.front import Replicas
from gpt_serve.cluster.manifest import IMPORT_PATH, write
from gpt_serve.cluster.metrics import ClusterDesk, ReplicaMetrics, joined
from gpt_serve.cluster.replica import EngineReplica
from gpt_serve.engine.bank import BankStats
from gpt_serve.errors import DeadlineExceeded, NotReady, UnknownTask, UsageError
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.messages import Answer, Failure, Format, Item, Passed, Stats
from gpt_serve.serve.metrics import Metrics, RequestMetrics
from gpt_serve.serve.routing import order
from gpt_serve.serve.state import ServerState

TASKS = [f"task-{number}" for number in range(600)]


def item(seconds: float = 5) -> Item:
    return Item("birds", b"image", Format(5), time.monotonic() + seconds)


# routing


def first(task: str, names: list[str]) -> str:
    return order(task, dict.fromkeys(names, 0), 8)[0]


def test_each_replica_gets_its_share_of_the_tasks() -> None:
    names = [f"r{number}" for number in range(6)]
    counts = Counter(first(task, names) for task in TASKS)
    assert set(counts) == set(names) and max(counts.values()) < 150 and min(counts.values()) > 60


def test_when_a_replica_goes_only_its_tasks_move() -> None:
    names = [f"r{number}" for number in range(6)]
    for task in TASKS:
        before = first(task, names)
        if before != "r3":
            assert first(task, [name for name in names if name != "r3"]) == before


def test_a_busy_replica_is_passed_over_and_the_least_busy_is_next_when_all_are() -> None:
    best, second, third = order("birds", {"a": 0, "b": 0, "c": 0}, 8)
    assert order("birds", {best: 7, second: 0, third: 0}, 8)[0] == best
    assert order("birds", {best: 8, second: 0, third: 0}, 8) == [second, third, best]
    assert order("birds", {best: 12, second: 11, third: 9}, 8) == [third, second, best]


# asking again


class Handle:
    """A deployment's handle whose replies are given; an exception is raised."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.answer = SimpleNamespace(remote=self.remote)
        self.left: list[float] = []

    async def remote(self, asked: Item, left: float) -> Any:
        self.left.append(left)
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply


GOOD = Answer("birds", "0123456789ab", b"{}")
LOST = ActorDiedError()


def ask(handle: Handle, seconds: float = 5) -> Any:
    async def run() -> Any:
        return await Replicas(handle).ask(item(seconds))

    return asyncio.run(run())


def test_a_dead_replica_loses_no_answer() -> None:
    handle = Handle(LOST, Failure.of(NotReady("the scheduler is closed")), LOST, GOOD)
    assert ask(handle) is GOOD
    assert handle.left == sorted(handle.left, reverse=True), "the deadline is one for all attempts"


def test_what_the_request_did_wrong_is_not_asked_again() -> None:
    handle = Handle(Failure.of(UnknownTask("unknown task 'birds'")))
    with pytest.raises(UnknownTask, match="unknown task 'birds'"):
        ask(handle)
    with pytest.raises(RayTaskError):
        ask(Handle(RayTaskError("answer", "Traceback", ValueError("a bug"))))


def test_asking_again_ends_with_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        ask(Handle(*[LOST] * 100), seconds=0.5)
    assert time.monotonic() - began < 5


# health


def test_a_replica_whose_engine_hangs_is_unhealthy() -> None:
    replica = EngineReplica.__new__(EngineReplica)
    replica.patience, replica._asked = 10.0, {}
    replica.check_health()
    replica._asked[0] = time.monotonic() - 9
    replica.check_health()
    replica._asked[0] = time.monotonic() - 11
    with pytest.raises(RuntimeError, match="has not answered for 10 s"):
        replica.check_health()


# configuration


def test_a_replica_may_hold_two_batches() -> None:
    options = engine_options(ServeConfig(max_batch_size=24), ClusterConfig(max_replicas=3))
    assert options["max_ongoing_requests"] == 48
    assert options["autoscaling_config"].max_replicas == 3


def test_an_update_starts_the_new_front_before_it_ends_the_old_one() -> None:
    """Ray ends the old one first by default, and requests wait until the new one has started."""
    assert application(ServeConfig(), ClusterConfig())._bound_deployment._deployment_config.max_surge_percent == 100


@pytest.mark.parametrize("values", [{"min_replicas": 3}, {"min_replicas": 0}, {"fronts": 0}, {"gpus": -1}])
def test_what_no_cluster_can_be(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ClusterConfig(**values)


def test_the_files_hold_the_application_and_not_the_key(tmp_path: Path) -> None:
    config = ServeConfig(
        adapters="s3://models/team", checkpoint=Path("/w.pth"), keys=Path("/k"), deadline=9, api_key="secret"
    )
    cluster = ClusterConfig(min_replicas=2, max_replicas=4, gpus=1)
    written = [path.read_text() for path in write(tmp_path, config, cluster)]
    assert "secret" not in "".join(written)
    serve, service = map(yaml.safe_load, written)
    ServeDeploySchema.model_validate(serve)
    (application,) = serve["applications"]
    assert application["import_path"] == IMPORT_PATH
    assert application["args"] == to_args(config, cluster)
    inside = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert inside["applications"] == serve["applications"] and inside["http_options"]["host"] == "0.0.0.0"
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 4)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (engine,) = from_args(application["args"])._bound_deployment.init_args
    (restored,) = engine._bound_deployment.init_args
    assert (restored.checkpoint, restored.keys, restored.deadline) == (Path("/w.pth"), Path("/k"), 9)


def test_only_what_was_changed_is_written_and_the_backbone() -> None:
    """Whose default the environment may set, here and not where a replica runs."""
    assert to_args(ServeConfig(), ClusterConfig())["serve"] == {"backbone": ServeConfig().backbone}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--min-replicas", "3"], "3 to 1 replicas cannot be: use 1 or more, the smaller first"),
        (["--adapters", "s3://"], "s3:// is no address of adapters"),
        (["--address", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1: start one, or use --local"),
        (["--yaml", "/proc/nowhere"], "--yaml /proc/nowhere cannot be written: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(args: list[str], line: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["deploy", "--adapters", str(tmp_path), *args])
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"gpt-serve: {line}" in result.stderr


# metrics


def stats(hits: float, waits: tuple[float, ...]) -> Stats:
    bank = dict.fromkeys((field.name for field in fields(BankStats)), 0.0) | {"hits": hits}
    return Stats(bank, [Passed(0.01, waits)] if waits else [])


def test_a_front_shows_what_each_replica_counted() -> None:
    told = []
    for replica, tasks in (("r1", ["birds", "birds"]), ("r2", ["dogs"])):
        counted = ReplicaMetrics()
        for number, task in enumerate(tasks, 1):
            counted.answered(Answer(task, "0123456789ab", b"{}"), stats(number, (0.1, 0.2)))
        counted.answered(Failure.of(UnknownTask("unknown task 'invented'")), stats(len(tasks), ()))
        told.append(pickle.loads(pickle.dumps((replica, counted.series()))))
    text = RequestMetrics(ServerState(8)).text(joined(told)).decode()
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["gpt_serve_replicas",] == 2
    assert values["gpt_serve_replica_answers_total", "birds", "r1"] == 2
    assert values["gpt_serve_replica_answers_total", "dogs", "r2"] == 1
    assert values["gpt_serve_replica_failures_total", "UnknownTask", "r2"] == 1
    assert values["gpt_serve_bank_hits_total", "r1"] == 2 and values["gpt_serve_bank_hits_total", "r2"] == 1
    assert values["gpt_serve_batch_size_sum", "r1"] == 4
    assert "invented" not in text, "names that clients make up are endless"
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names)), "a family is announced once, however many replicas have it"
    alone = {name for name in re.findall(r"^# TYPE (\S+)", Metrics(ServerState(8)).text().decode(), re.MULTILINE)}
    assert alone <= set(names), "what one machine shows"


@pytest.mark.parametrize("told", [TimeoutError(), RayServeException("none is there")])
def test_replicas_that_do_not_tell_are_left_out_of_the_metrics(told: Exception) -> None:
    class Broadcast:
        async def results_async(self, **_: Any) -> Any:
            raise told

    async def scrape() -> bytes:
        state = ServerState(8)
        desk = ClusterDesk(ServeConfig(), Replicas(Handle()), state, RequestMetrics(state))
        desk.handle = SimpleNamespace(broadcast=lambda name: Broadcast())
        return await desk.exposition()

    text = asyncio.run(scrape()).decode()
    assert "gpt_serve_replicas 0.0" in text and "gpt_serve_in_flight 0.0" in text


def test_a_signal_during_the_start_ends_it_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's handler, which aborts the process, is not what a signal meets."""
    ended: list[str] = []

    def start(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "ray", SimpleNamespace(init=lambda **_: None, shutdown=lambda: ended.append("ray")))
    monkeypatch.setattr(run, "serve", SimpleNamespace(start=start))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.deploy(ServeConfig(adapters=tmp_path), ClusterConfig(), None, print)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == ["ray"]
