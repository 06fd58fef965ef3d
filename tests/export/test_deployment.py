"""What export/README.md shows is what happens; and the runner on really exported graphs answers as the server does."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from tests.export.stand_in import multi, single
from tests.factories import make_adapter
from tests.hostile_images import photo

ROOT = Path(__file__).parents[2]
README = (ROOT / "export" / "README.md").read_text()
TASKS = ("caltech101", "digits", "flowers")

sys.path.insert(0, str(ROOT / "export"))
import run  # noqa: E402


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands(program: str) -> list[str]:
    lines = [line.split("   #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line.removeprefix(program).strip() for line in lines if line.startswith(program)]


@pytest.mark.parametrize("command", commands("gpt-serve"))
def test_every_command_is_one_that_the_program_takes(command: str) -> None:
    name, *arguments = shlex.split(command)
    found = main.get_command(click.Context(main), name)
    assert found is not None
    found.make_context(name, arguments, parent=click.Context(main))  # raises on an unknown or malformed option


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the page has it: the runner, stand-ins for the graphs, two images."""
    root = tmp_path_factory.mktemp("deployment")
    (root / "export").mkdir()
    for name in ("run.py", "bank.py", "adapter_file.py"):
        shutil.copy(ROOT / "export" / name, root / "export" / name)
    single(root / "export" / "flowers.onnx")
    multi(root / "export" / "multi.onnx", [make_adapter(task=task) for task in TASKS])
    photo().save(root / "photo.jpg")
    photo(seed=1).save(root / "other.jpg")
    return root


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("command", [line for line in commands("python") if "CUDA" not in line])
def test_every_command_of_the_runner_works(deployment: Path, command: str) -> None:
    done = python(*shlex.split(command), cwd=deployment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "photo.jpg" in done.stdout


@pytest.mark.parametrize("block", [block for block in blocks("python") if "CUDA" not in block])
def test_every_example_runs(deployment: Path, block: str) -> None:
    done = python("-c", block, cwd=deployment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_every_example_ran_but_the_one_for_gpus() -> None:
    assert [bool(re.search("CUDA", block)) for block in blocks("python")] == [False, False, False, True]
    compile(blocks("python")[-1], "README.md", "exec")


@pytest.mark.slow
def test_the_shown_answer_is_real(flowers_graph: Path, shared_data: Path) -> None:
    (shown,) = (block for block in blocks("console") if "run.py" in block)
    command, answer = shown.strip().splitlines()
    name = command.split()[-1]
    graph = ["export/run.py", "export/flowers.onnx"]
    assert command == shlex.join(["$", "python", *graph, name]).replace("'$'", "$")
    image = shared_data / "flowers12" / "test" / name
    done = python(str(ROOT / "export" / "run.py"), str(flowers_graph), str(image), cwd=ROOT)
    assert done.stdout.strip().removeprefix(str(image)) == answer.removeprefix(name)


@pytest.mark.slow
def test_single_graph_answers_as_predict_does(flowers_graph: Path, bundled: Backbone, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        photo(90, 70, number).save(path)
    done = python(str(ROOT / "export" / "run.py"), str(flowers_graph), *map(str, paths), "--json", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    assert set(value) == {"task", "images"} and value["task"] == "flowers"
    results = Engine(bundled, AdapterStore(ROOT / "adapters" / "mae-vit-tiny-32")).predict(
        [("flowers", path.read_bytes()) for path in paths]
    )
    for path, shown, expected in zip(paths, value["images"], results, strict=True):
        assert (shown["image"], shown["revision"]) == (str(path), expected.revision)
        best = [(item["label"], pytest.approx(item["probability"], abs=0.01)) for item in shown["predictions"]]
        assert [(label, share) for label, share in expected.top(5)] == best


@pytest.mark.slow
def test_multi_graph_answers_mixed_batches_as_the_engine_does(shipped_graph: Path, bundled: Backbone) -> None:
    model = run.Model(shipped_graph)
    assert list(model.tasks) == list(TASKS)
    side = bundled.spec.preprocess.input_size[0]
    cover = int(side / bundled.spec.preprocess.crop_pct)  # so that nothing is scaled, which Pillow rounds differently
    jobs = [(TASKS[number % 3], photo(cover, cover, number)) for number in range(run.BATCH + 4)]
    found = model.predict([image for _, image in jobs], [task for task, _ in jobs])
    results = Engine(bundled, AdapterStore(ROOT / "adapters" / "mae-vit-tiny-32")).predict(jobs)
    for answer, expected in zip(found, results, strict=True):
        assert (answer.task.name, answer.task.revision) == (expected.task, expected.revision)
        torch.testing.assert_close(
            torch.from_numpy(np.array(answer.probabilities)), expected.probabilities, atol=1e-5, rtol=0
        )
