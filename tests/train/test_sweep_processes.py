"""Commands as a user runs them, with processes of their own: of this machine, and of one Ray cluster for all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bulk.inputs import open_images
from gpt_serve.bulk.predict import predict_part
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.recipes.recipe import make_recipe
from tests.factories import make_adapter
from tests.train.conftest import Recorder

pytestmark = pytest.mark.slow
# The command itself must not need the backbone.
PROGRAM = """
import os, signal
from gpt_serve.bulk import parts
from gpt_serve.cli.main import main
parts.PART = 5
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it runs in the background
if __name__ == "__main__":
    from gpt_serve.model.backbone import Backbone
    Backbone.load = None
    main(prog_name="gpt-serve")
"""
FLAGS = ["--device", "cpu", "--epochs", "1", "--gate-init", "5", "--prompts", "2"]
RATES = "0.02,0.01"


def start(
    folder: Path, data: str, adapters: Path, *args: str, rates: str = RATES, **options: Any
) -> subprocess.Popen[str]:
    flags = ["--data", data, "--adapters", str(adapters), "--lr", rates, *FLAGS]
    return command(folder, "sweep", *flags, *args, **options)


def command(folder: Path, name: str, *args: str, **options: Any) -> subprocess.Popen[str]:
    program = folder / "command.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), name, "--task", "colours", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for_a_trial(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert any(line.startswith("trial 1 of ") for line in process.stderr)


def children_of(pid: int) -> list[int]:
    """Those that train: all but the one that counts semaphores."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "spawn_main"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def check_it_is_what_train_gives(report: dict[str, Any], backbone: Backbone, data: Path, adapters: Path) -> None:
    best = report["sweep"]["trials"][report["sweep"]["best"]]
    recipe = make_recipe("lda", epochs=1, lr=best["lr"], gate_init=5.0, prompts=2)
    summary = train_adapter(
        backbone, TrainingJob("colours", str(data), adapters / "trained", recipe), Recorder(), World()
    )
    assert summary is not None and best["val_loss"] == pytest.approx(summary["metrics"]["val_loss"], rel=1e-4)
    swept, trained = (AdapterStore(folder).load("colours").adapter for folder in (adapters, adapters / "trained"))
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(swept, name), getattr(trained, name))


def test_an_interrupted_sweep_resumes_and_publishes_what_train_would(
    bundled: Backbone, colours: Path, tmp_path: Path
) -> None:
    adapters = tmp_path / "adapters"
    # Ctrl-C reaches every process of the terminal's group.
    first = start(tmp_path, str(colours), adapters)
    wait_for_a_trial(first)
    os.killpg(first.pid, signal.SIGINT)
    out, err = first.communicate(timeout=300)
    assert (first.returncode, out) == (130, "")
    *_, how, interrupted = err.splitlines()
    assert how.endswith("of 2 trials are done: add --resume to continue") and interrupted == "gpt-serve: interrupted"

    # From another folder, with a relative path, and in several processes.
    (tmp_path / "colours").symlink_to(colours)
    again = start(tmp_path, "colours", adapters, "--resume", "--json", "--jobs", "2", cwd=tmp_path)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert f"resuming after {how[0]} of 2 trials" in err and "Traceback" not in err and "leaked" not in err
    report = json.loads(out)
    assert [trial["status"] for trial in report["sweep"]["trials"]] == ["finished"] * 2
    assert not (adapters / ".train" / "colours").exists()
    check_it_is_what_train_gives(report, bundled, colours, adapters)


def test_processes_that_are_killed(colours: Path, tmp_path: Path) -> None:
    """One that trains costs its trial; when it is the command, those that train end with it."""
    sweep = start(tmp_path, str(colours), tmp_path / "adapters", rates="0.0001,0.02,0.01")
    wait_for_a_trial(sweep)
    (child,) = children_of(sweep.pid)
    os.kill(child, signal.SIGKILL)
    assert sweep.stderr is not None
    assert any("failed: its process died: it may have run out of memory" in line for line in sweep.stderr)
    while not (left := children_of(sweep.pid)):
        assert sweep.poll() is None
        time.sleep(0.1)
    sweep.kill()
    sweep.communicate(timeout=60)
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in left):
            return
        time.sleep(0.1)
    pytest.fail("a process goes on without its command")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    utils = pytest.importorskip("ray.cluster_utils")
    cluster = utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False},
    )
    yield cluster
    cluster.shutdown()


def test_a_ray_cluster_sweeps_as_a_machine_does(bundled: Backbone, colours: Path, tmp_path: Path, cluster: Any) -> None:
    adapters = tmp_path / "adapters"
    sweep = start(tmp_path, str(colours), adapters, "--json", "--ray-address", cluster.address, rates="0.01")
    out, err = sweep.communicate(timeout=900)
    assert sweep.returncode == 0, err
    check_it_is_what_train_gives(json.loads(out), bundled, colours, adapters)


def test_a_ray_cluster_trains_what_a_machine_does(
    bundled: Backbone, colours: Path, tmp_path: Path, cluster: Any
) -> None:
    """From a relative path; what the run tells is shown by the command, which loads no backbone."""
    (tmp_path / "colours").symlink_to(colours)
    flags = ["--data", "colours", "--adapters", "adapters", "--device", "cpu", "--epochs", "1", "--prompts", "2"]
    remote = command(tmp_path, "train", *flags, "--json", "--ray-address", cluster.address, cwd=tmp_path)
    out, err = remote.communicate(timeout=900)
    assert remote.returncode == 0, err
    assert "epoch   1 " in err
    recipe = make_recipe("lda", epochs=1, prompts=2)
    job = TrainingJob("colours", str(colours), tmp_path / "here", recipe, instant=True)
    summary = train_adapter(bundled, job, Recorder(), World())
    assert summary is not None and json.loads(out)["metrics"]["val_loss"] == pytest.approx(
        summary["metrics"]["val_loss"], rel=1e-4
    )
    there, here = (AdapterStore(tmp_path / name).load("colours") for name in ("adapters", "here"))
    assert there.revision == json.loads(out)["revision"]
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(there.adapter, name), getattr(here.adapter, name))
    assert not list((tmp_path / "adapters" / ".train").glob("*shared*"))


def test_a_ray_cluster_predicts_as_a_machine_does(
    bundled: Backbone, colours: Path, tmp_path: Path, cluster: Any
) -> None:
    """24 images, one of them broken, in parts of 5 for two tasks."""
    store = AdapterStore(tmp_path / "adapters")
    for seed, task in enumerate(("colours", "other")):
        store.publish(make_adapter(bundled.spec, task, seed=seed))
    shutil.copytree(colours / "train", tmp_path / "images", ignore=lambda _, names: names[8:] if len(names) > 3 else [])
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"broken")
    tasks, images = ("colours", "other"), open_images(str(tmp_path / "images"))
    engine = Engine(bundled, store)
    here = predict_part(engine, tasks, images, (0, len(images)))
    flags = ["--task", "other", "--input", "images", "--output", "out.parquet", "--adapters", "adapters"]
    address = ["--backbone", bundled.name, "--device", "cpu", "--ray-address", cluster.address, "--json"]
    remote = command(tmp_path, "predict", *flags, *address, cwd=tmp_path)
    out, err = remote.communicate(timeout=900)
    assert remote.returncode == 1, err
    assert json.loads(out) | {"output": ""} == {
        "tasks": list(tasks), "output": "", "images": 25, "rows": 50, "errors": 2
    }  # fmt: skip
    there = pq.read_table(tmp_path / "out.parquet")
    for row, expected in zip(there.to_pylist(), here.to_pylist(), strict=True):
        assert row | {"probability": None} == expected | {"probability": None}
        assert row["error"] or row["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    assert not list(tmp_path.glob(".out.parquet*"))
