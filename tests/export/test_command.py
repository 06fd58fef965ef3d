"""``gpt-serve export`` with the bundled backbone and the adapters that ship."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.engine import Engine
from gpt_serve.export.files import bank_folder
from gpt_serve.export.session import Graph
from gpt_serve.images.decode import decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.model.backbone import Backbone
from tests.export.conftest import ADAPTERS, run_export


def test_a_real_photograph_gets_the_answer_of_the_engine(
    flowers_graph: Path, bundled: Backbone, shared_data: Path
) -> None:
    """By onnxruntime alone, from what the graph says about itself."""
    session = ort.InferenceSession(flowers_graph, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    engine = Engine(bundled, AdapterStore(ADAPTERS))
    files = [next(folder.iterdir()).read_bytes() for folder in sorted((shared_data / "flowers12" / "test").iterdir())]
    expected = [prediction.probabilities.numpy() for prediction in engine.predict([("flowers", f) for f in files])]
    preprocess = bundled.spec.preprocess
    assert json.loads(metadata["preprocess"])["input_size"] == list(preprocess.input_size)
    pixels = torch.stack([preprocess_image(decode(file), preprocess) for file in files]).permute(0, 2, 3, 1)
    (actual,) = session.run(["probabilities"], {"images": np.ascontiguousarray(pixels.numpy())})
    np.testing.assert_allclose(actual, np.stack(expected), atol=1e-5)
    assert (actual.argmax(axis=1) == np.stack(expected).argmax(axis=1)).all()


@pytest.mark.slow
def test_the_table_for_people(shipped_graph: Path) -> None:
    output = shipped_graph
    lines = output.with_suffix(".txt").read_text().splitlines()
    assert lines[0].split()[:2] == ["task", "images"]
    assert [line.split()[0] for line in lines[1:3]] == ["digits", "flowers"]
    assert lines[-1].startswith(str(output)) and "MB" in lines[-1] and "nodes" in lines[-1]
    bank = sorted(path.name for path in bank_folder(output, Graph(output).metadata).iterdir())
    assert bank == ["caltech101.safetensors", "digits.safetensors", "flowers.safetensors"]


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
    result = run_export(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("gpt-serve: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """A finder that knows no onnxscript."""
    script = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
from gpt_serve.cli.main import main
main()
"""
    command = [sys.executable, "-c", script, "export", "--task", "flowers", "--output", str(tmp_path / "a.onnx")]
    result = subprocess.run([*command, "--adapters", str(ADAPTERS)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "gpt-serve: ONNX graphs need onnxscript: pip install onnx onnxscript onnxruntime-gpu\n"
    assert not list(tmp_path.iterdir())
