"""``gpt-serve export`` with the bundled backbone and the adapters that ship."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from gpt_serve.backbone import Backbone
from gpt_serve.cli import main
from gpt_serve.engine import Engine
from gpt_serve.images import decode, preprocess_image
from gpt_serve.store import AdapterStore

ADAPTERS = Path(__file__).parents[2] / "adapters"


def run(*args: str) -> Result:
    return CliRunner(catch_exceptions=False).invoke(
        main, ["export", "--device", "cpu", "--adapters", str(ADAPTERS), *args], prog_name="gpt-serve"
    )


@pytest.fixture(scope="session")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of the shipped flowers adapter."""
    output = tmp_path_factory.mktemp("flowers") / "flowers.onnx"
    result = run("--task", "flowers", "--output", str(output), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    summary = json.loads(result.stdout)
    assert summary["task"] == "flowers" and summary["output"] == str(output)
    return output


def test_a_real_photograph_gets_the_answer_of_the_engine(flowers: Path, bundled: Backbone, shared_data: Path) -> None:
    """By onnxruntime alone, from what the graph says about itself."""
    session = ort.InferenceSession(flowers, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    engine = Engine(bundled, AdapterStore(ADAPTERS))
    files = [next(folder.iterdir()).read_bytes() for folder in sorted((shared_data / "flowers12" / "test").iterdir())]
    expected = [prediction.probabilities.numpy() for prediction in engine.predict([("flowers", f) for f in files])]
    preprocess = bundled.spec.preprocess
    assert json.loads(metadata["preprocess"])["input_size"] == list(preprocess.input_size)
    pixels = torch.stack([preprocess_image(decode(file), preprocess) for file in files]).permute(0, 2, 3, 1)
    (actual,) = session.run(None, {"images": np.ascontiguousarray(pixels.numpy())})
    np.testing.assert_allclose(actual, np.stack(expected), atol=1e-5)
    assert (actual.argmax(axis=1) == np.stack(expected).argmax(axis=1)).all()


def test_the_table_for_people(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(_folder(tmp_path / "data" / "0") / "a.png")
    output = tmp_path / "many.onnx"
    result = run("--tasks", "digits, flowers", "--output", str(output), "--data", f"digits={tmp_path / 'data'}")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["task", "images"]
    assert [line.split()[0] for line in lines[1:3]] == ["digits", "flowers"]
    assert lines[-1].startswith(str(output)) and "MB" in lines[-1] and "nodes" in lines[-1]
    assert sorted(path.name for path in (tmp_path / "many.bank").iterdir()) == [
        "digits.safetensors",
        "flowers.safetensors",
    ]
    added = run("--task", "caltech101", "--add-to", str(output))
    assert (added.exit_code, added.stderr) == (0, "")
    assert (tmp_path / "many.bank" / "caltech101.safetensors").is_file()


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name what to export: one of --task NAME, --tasks A,B,C and --all"),
        (["--task", "flowers", "--all"], "name what to export"),
        (["--task", "flowers"], "name where to: --output FILE.onnx, or --add-to"),
        (["--all", "--add-to", "x.onnx"], "name where to"),
        (["--task", "flowers", "--output", "a.onnx", "--add-to", "b.onnx"], "name where to"),
        (["--task", "unknown", "--output", "a.onnx"], "unknown"),
        (["--tasks", "flowers,", "--output", "a.onnx"], "task name '' is not allowed"),
        (["--task", "flowers", "--output", "a.pt"], "ends in .onnx"),
        (["--task", "flowers", "--output", "a.onnx", "--precision", "int8"], "pass --data flowers=DIR"),
        (["--tasks", "flowers,digits", "--output", "a.onnx", "--data", "x"], "--data TASK=x"),
        (["--tasks", "flowers,digits", "--output", "a.onnx", "--input", "float"], "takes uint8 pixels"),
        (["--task", "flowers", "--add-to", "missing.onnx"], "missing.onnx does not open"),
    ],
)
def test_a_mistake_gets_one_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("gpt-serve: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(missing: str, tmp_path: Path) -> None:
    """None in ``sys.modules`` is how Python itself marks a module that cannot be imported."""
    script = f"import sys; sys.modules[{missing!r}] = None; from gpt_serve.cli import main; main()"
    command = [sys.executable, "-c", script, "export", "--task", "flowers", "--output", str(tmp_path / "a.onnx")]
    result = subprocess.run([*command, "--adapters", str(ADAPTERS)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"gpt-serve: ONNX graphs need {missing}: pip install onnx onnxscript onnxruntime-gpu\n"
    assert not list(tmp_path.iterdir())
