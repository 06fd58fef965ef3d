"""Segmentation by commands: train, eval and tasks, and mistakes in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpt_serve.cli.main import main
from tests.train.masks.conftest import write_scenes


def run(*args: str) -> Result:
    return CliRunner(catch_exceptions=False).invoke(main, args, prog_name="gpt-serve")


def run_json(*args: str) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("masks")
    write_scenes(root / "data", {"train": 6, "val": 2, "test": 2})
    options = ["--backbone", "mae-vit-tiny-32", "--device", "cpu", "--adapters", str(root / "adapters")]
    settings = ["--method", "linear", "--epochs", "1", "--ignore", "200", "--taps", "11", "--geometry", "squash"]
    return root, run_json("train", "--task", "scenes", "--data", str(root / "data"), *options, *settings)


def measured(root: Path, *options: str) -> Result:
    store = ["--backbone", "mae-vit-tiny-32", "--device", "cpu", "--adapters", str(root / "adapters")]
    return run("eval", "--task", "scenes", "--data", str(root / "data"), *store, *options)


def test_train_publishes_and_eval_measures_the_same(trained: tuple[Path, dict[str, Any]]) -> None:
    root, summary = trained
    assert summary["kind"] == "segmentation" and summary["recipe"]["geometry"] == "squash"
    found = json.loads(measured(root, "--json").stdout)
    assert found["revision"] == summary["revision"]
    assert found["miou"] == pytest.approx(summary["metrics"]["test_miou"], abs=2e-3)


def test_eval_prints_a_line_for_each_class(trained: tuple[Path, dict[str, Any]]) -> None:
    lines = measured(trained[0], "--slide").stdout.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["sky", "grass", "wall", "scenes"]
    assert "mIoU" in lines[-1] and "pixel accuracy" in lines[-1] and "on 2 images" in lines[-1]


def test_tasks_tells_the_kind(trained: tuple[Path, dict[str, Any]]) -> None:
    root, summary = trained
    (item,) = run_json("tasks", "--adapters", str(root / "adapters"))["tasks"]
    assert (item["kind"], item["val_miou"], item["val_accuracy"]) == (
        "segmentation",
        summary["metrics"]["val_miou"],
        None,
    )
    assert "mIoU" in run("tasks", "--adapters", str(root / "adapters")).stdout


MISTAKES = {
    "options of the other kind": (
        ["train", "--task", "a", "--data", "digits", "--head", "linear"],
        "--head is for",
    ),
    "closing": (["train", "--task", "a", "--data", "DATA", "--close-gates"], "--close-gates is for classification"),
    "recipe": (["train", "--task", "a", "--data", "DATA", "--recipe", "spt"], "for masks choose masks or paper"),
    "unknown values": (
        ["train", "--task", "a", "--data", "DATA", "--device", "cpu", "--backbone", "mae-vit-tiny-32"],
        "10 label files with values that are none of the 3 classes",
    ),
    "closing gates": (
        ["close-gates", "--task", "scenes", "--data", "DATA", "--backbone", "mae-vit-tiny-32"],
        "(method linear): there is nothing to close",
    ),
    "calibrating": (
        ["calibrate", "--task", "scenes", "--data", "DATA", "--backbone", "mae-vit-tiny-32"],
        "adapter 'scenes' answers with masks: this is for classification",
    ),
    "both protocols": (
        ["eval", "--task", "scenes", "--data", "DATA", "--multi-scale", "--whole", "--backbone", "mae-vit-tiny-32"],
        "--multi-scale takes windows",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(trained: tuple[Path, dict[str, Any]], name: str) -> None:
    args, message = MISTAKES[name]
    root = trained[0]
    places = [str(root / "data") if item == "DATA" else item for item in args]
    result = run(*places, "--adapters", str(root / "adapters"))
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and message in lines[-1], result.stderr
    assert sum(line.startswith("gpt-serve: ") for line in lines) == 1
