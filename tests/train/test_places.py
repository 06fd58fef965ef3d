"""`train --ray-address` with a stub in place of Ray; `test_sweep_processes` runs it on a cluster."""

import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.model.backbone import Backbone
from gpt_serve.train import loading, places, relay
from gpt_serve.train.data.views import Unreadable
from gpt_serve.train.job import Reporter
from gpt_serve.train.relay import Relay, Replay
from gpt_serve.train.workers import Submit
from tests.train.conftest import Recorder


def submit(function: Callable[..., Any], *args: Any) -> "Future[Any]":
    """Run it here, with arguments that could have come from another process."""
    done: Future[Any] = Future()
    try:
        done.set_result(function(*[arg if isinstance(arg, Relay) else pickle.loads(pickle.dumps(arg)) for arg in args]))
    except Exception as error:
        done.set_exception(error)
    return done


@pytest.fixture
def asked(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What Ray was asked for: address, device and how many processes."""
    asked = []

    @contextmanager
    def workers(*options: Any) -> Iterator[Submit]:
        asked.append(options)
        yield submit

    @contextmanager
    def relaying(reporter: Reporter) -> Iterator[Relay]:
        yield Relay(Replay(reporter).tell)

    monkeypatch.setattr(places, "ray_workers", workers)
    monkeypatch.setattr(places, "ray_relay", relaying)
    for module in (loading, places):
        monkeypatch.setattr(module, "load_backbone", lambda load: tiny)
    return asked


def train(*args: str) -> Result:
    flags = ["--task", "colours", "--method", "gated", "--recipe", "adamw", "--epochs", "2", "--prompts", "2"]
    return CliRunner().invoke(main, ["train", *flags, "--ray-address", "auto", *args])


def test_the_adapter_lands_where_a_local_training_puts_it(
    asked: list[Any], colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(colours)
    result = train("--data", "data", "--adapters", "adapters", "--close-gates", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["revision"] == AdapterStore(tmp_path / "adapters").load("colours").revision
    assert len(summary["closing"]) == 1
    assert result.stderr.count("epoch   2 ") >= 1, "what it tells is shown here"
    assert asked == [("auto", "auto", 1)]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--device", "cuda:1"], "--device cuda:1: Ray chooses among the GPUs of its machines: use auto, cpu or cuda"),
        (["--data", "nowhere"], "nowhere"),
        (["--resume"], "nothing to resume: "),
        (["--adapters", "/proc/nowhere"], "the folder /proc/nowhere/.train cannot be made or written to: "),
    ],
)
def test_mistakes_are_one_line(args: list[str], line: str, asked: list[Any], colours: Path, tmp_path: Path) -> None:
    result = train("--data", str(colours), "--adapters", str(tmp_path / "adapters"), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("gpt-serve: ") and line in last and "Traceback" not in result.stderr


def test_torchrun_and_ray_do_not_go_together(
    asked: list[Any], colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = train("--data", str(colours), "--adapters", str(tmp_path))
    assert result.exit_code == 2 and "start the command without torchrun" in result.stderr and not asked


def test_a_folder_that_only_the_command_sees_is_known_before_anything_trains(
    asked: list[Any], colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self, **_: "shared" not in self.name and self.is_dir())
    result = train("--data", str(colours), "--adapters", str(tmp_path / "adapters"))
    assert result.exit_code == 2 and "must be on a disk that all machines of the cluster share" in result.stderr
    assert AdapterStore(tmp_path / "adapters").tasks() == []


class Counting(Recorder):
    """Counts images read and trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.trained = 0

    def scanning(self, total: int, what: str = "checking images") -> Callable[[], object]:
        def tick() -> None:
            self.read += 1

        return tick

    def batch(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        self.trained += images


def test_a_relay_tells_all_that_counts_and_sums_up_what_comes_often(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, sent = Counting(), []
    replay = Replay(reporter)

    def send(name: str, arguments: tuple[Any, ...]) -> None:
        sent.append(name)
        replay.tell(*pickle.loads(pickle.dumps((name, arguments))))

    clock = iter(range(1, 10**6))
    monkeypatch.setattr(relay.time, "monotonic", lambda: next(clock) * relay.INTERVAL / 10)
    told = Relay(send)
    tick = told.scanning(100)
    for _ in range(100):
        tick()
    told.unreadable([Unreadable("a.png", "is empty")])
    told.notice("one line")
    told.training(40, 0, 1)
    for _ in range(50):
        told.batch(0, 1.0, 0.5, 4)
    assert 80 < reporter.read <= 100 and 160 < reporter.trained <= 200
    assert len(sent) < 45, "not a message for each"
    assert reporter.notices == ["one line"] and reporter.bad == [Unreadable("a.png", "is empty")]
