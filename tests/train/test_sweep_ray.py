"""The command as a user runs it, with Ray's own processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import Job
from gpt_serve.train.recipes.recipe import make_recipe
from tests.train.conftest import Recorder

PROGRAM = "from gpt_serve.cli.main import main; main(prog_name='gpt-serve')"
FLAGS = ["--device", "cpu", "--epochs", "1", "--lr", "0.0001,0.02,0.01", "--gate-init", "5", "--prompts", "2"]


def start(data: str, adapters: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "sweep", "--task", "colours", "--data", data]
    return subprocess.Popen(
        [*command, "--adapters", str(adapters), *FLAGS, *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_and_publishes_what_train_would(
    bundled: Backbone, colours: Path, tmp_path: Path
) -> None:
    stored = tmp_path / ".train" / "colours" / "trials"
    # Ctrl-C reaches every process of the terminal's group, Ray's among them.
    first = start(str(colours), tmp_path, start_new_session=True)
    assert first.stdout is not None and first.stderr is not None
    for line in first.stderr:
        if line.startswith("trial 1 of 3: lr 0.0001, gate init 5, prompts 2: val "):
            os.killpg(first.pid, signal.SIGINT)
            break
    out, err = first.communicate(timeout=300)
    assert (first.returncode, out) == (130, "")
    *_, how, interrupted = err.splitlines()
    done = len(list(stored.iterdir()))
    assert 1 <= done < 3 and {path.suffix for path in stored.iterdir()} == {".json"}
    assert how == f"{done} of 3 trials are done: add --resume to continue"
    assert interrupted == "gpt-serve: interrupted"
    kept = json.loads(next(path for path in stored.iterdir() if '"lr": 0.0001' in path.read_text()).read_text())

    # From another folder, with a relative path: workers must find the images none the less.
    again = start("colours", tmp_path, "--resume", "--json", cwd=link(colours, tmp_path))
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert f"resuming after {done} of 3 trials" in err and "Traceback" not in err
    report = json.loads(out)
    trials = report["sweep"]["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 3
    assert trials[0]["val_loss"] == kept["outcome"]["val_loss"]
    assert not (tmp_path / ".train" / "colours").exists()

    best = trials[report["sweep"]["best"]]
    recipe = make_recipe("lda", epochs=1, lr=best["lr"], gate_init=5.0, prompts=2)
    summary = train_adapter(bundled, Job("colours", str(colours), tmp_path / "trained", recipe), Recorder(), World())
    assert summary is not None and best["val_loss"] == pytest.approx(summary["metrics"]["val_loss"], rel=1e-4)
    swept, trained = (AdapterStore(folder).load("colours").adapter for folder in (tmp_path, tmp_path / "trained"))
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(swept, name), getattr(trained, name))


def link(data: Path, folder: Path) -> Path:
    """A folder in which the images are called ``colours``."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "colours").symlink_to(data)
    return elsewhere
