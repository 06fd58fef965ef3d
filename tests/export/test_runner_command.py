"""The runner as its user starts it: answers, refusals, no torch; and what the page about it shows."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from gpt_serve.adapters.adapter import revision_of
from tests.export.stand_in import (
    LABELS,
    REVISION,
    multi,
    multi_probabilities,
    single,
    single_probabilities,
    some_adapters,
)
from tests.factories import TINY_SPEC, make_adapter
from tests.hostile_images import photo, png_bomb

EXPORT = Path(__file__).parents[2] / "export"
RUNNER = EXPORT / "run.py"

sys.path.insert(0, str(EXPORT))
import run  # noqa: E402


def command(*arguments: str | Path, cwd: Path, runner: Path = RUNNER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(runner), *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs and images, good and bad; shared by tests that only read."""
    root = tmp_path_factory.mktemp("runner")
    single(root / "flowers.onnx")
    adapters = some_adapters(deep=False)
    multi(root / "multi.onnx", adapters)
    multi(root / "wrong.onnx", adapters)
    foreign = make_adapter(task="gated", backbone="vit_huge", backbone_sha256="cd" * 32)
    (root / "wrong.bank" / "gated.safetensors").write_bytes(foreign.to_bytes())
    header = struct.pack("<Q", 2**40)
    (root / "wrong.bank" / "probe.safetensors").write_bytes(header + b"{}")
    data = (root / "multi.bank" / "hard.safetensors").read_bytes()
    (root / "wrong.bank" / "hard.safetensors").write_bytes(data[:-1])
    multi(root / "alone.onnx", [])
    single(root / "other.onnx", metadata={"format": "gpt-serve-onnx/9"})
    identity = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
    )
    model = helper.make_model(identity, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, root / "foreign.onnx")
    (root / "text.onnx").write_text("hello")
    (root / "empty.onnx").write_bytes(b"")
    single(root / "large.onnx", external=True)
    (root / "large.onnx.data").unlink()
    single(root / "short.onnx", external=True)
    (root / "short.onnx.data").write_bytes((root / "short.onnx.data").read_bytes()[:100])
    photo().save(root / "one.png")
    photo(seed=1).save(root / "two.jpg")
    (root / "cut.jpg").write_bytes((root / "two.jpg").read_bytes()[:800])
    (root / "note.png").write_text("not an image")
    photo().save(root / "old.gif")
    (root / "huge.png").write_bytes(png_bomb(10_000, 10_000))  # Pillow would only warn
    (root / "bomb.png").write_bytes(png_bomb(20_000, 20_000))
    return root


def expected_top(pixels: np.ndarray) -> list[str]:
    return [LABELS[at] for at in np.argsort(-single_probabilities(pixels[None])[0])]


def test_a_stranger_is_named_in_words_and_in_json(folder: Path) -> None:
    single(folder / "careful.onnx", known=0.02)
    (answer,) = json.loads(command("careful.onnx", "one.png", "--json", cwd=folder).stdout)["images"]
    assert (answer["known"], answer["unknown"]) == (0.02, True)
    assert command("careful.onnx", "one.png", cwd=folder).stdout.endswith(" %, probably none of these\n")


def test_a_line_for_each_image(folder: Path) -> None:
    done = command("flowers.onnx", "two.jpg", "one.png", "two.jpg", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["two.jpg", "one.png", "two.jpg"]
    assert lines[0] == lines[2] != lines[1]
    for line, name in zip(lines, ["two.jpg", "one.png"], strict=False):
        pixels = run.prepare(run.open_image(folder / name), TINY_SPEC.preprocess.to_dict())
        assert re.findall(r"(\w+) \d+\.\d %", line) == expected_top(pixels)


def test_json_is_one_object_of_the_shape_that_predict_prints(folder: Path) -> None:
    done = command("flowers.onnx", "one.png", "--json", "--top-k", "2", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    pixels = run.prepare(run.open_image(folder / "one.png"), TINY_SPEC.preprocess.to_dict())
    best = sorted(zip(LABELS, single_probabilities(pixels[None])[0].tolist(), strict=True), key=lambda item: -item[1])
    predictions = [{"label": label, "probability": pytest.approx(share, abs=1e-5)} for label, share in best[:2]]
    image = {"image": "one.png", "revision": REVISION, "predictions": predictions}
    assert value == {"task": "flowers", "images": [image]}


def test_a_task_of_a_multi_graph(folder: Path) -> None:
    done = command("multi.onnx", "one.png", "--task", "shallow", "--json", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    (adapter,) = [adapter for adapter in some_adapters(deep=False) if adapter.task == "shallow"]
    pixels = run.prepare(run.open_image(folder / "one.png"), TINY_SPEC.preprocess.to_dict())
    (expected,) = multi_probabilities(adapter, pixels[None])
    found = {item["label"]: item["probability"] for item in value["images"][0]["predictions"]}
    assert found == pytest.approx(dict(zip(adapter.labels, expected.tolist(), strict=True)), abs=1e-5)
    assert (value["task"], value["images"][0]["revision"]) == ("shallow", revision_of(adapter.to_bytes()))


def test_the_right_task_of_a_single_graph_may_be_named(folder: Path) -> None:
    assert command("flowers.onnx", "one.png", "--task", "flowers", cwd=folder).returncode == 0


def test_any_file_name(folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(folder / "one.png", tmp_path / name)
    done = command(folder / "flowers.onnx", name, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("caf\N{REPLACEMENT CHARACTER}.png: ")
    done = command(folder / "flowers.onnx", name, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["images"][0]["image"] == name


def test_images_that_cannot_be_read_take_nothing_from_the_others(folder: Path) -> None:
    given = ("cut.jpg", "one.png", "absent.png", "two.jpg", "cut.jpg")
    done = command("flowers.onnx", *given, cwd=folder)
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == ["one.png", "two.jpg"]
    assert [line.split(" ")[1] for line in done.stderr.splitlines()] == ["cut.jpg", "absent.png", "cut.jpg"]
    told = command("flowers.onnx", *given, "--json", cwd=folder)
    assert (told.returncode, told.stderr) == (1, done.stderr)
    images = json.loads(told.stdout)["images"]
    assert [image["image"] for image in images] == list(given)
    assert ["error" in image for image in images] == [True, False, True, False, True]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_labels_of_any_script_can_be_shown_anywhere(tmp_path: Path, encoding: str) -> None:
    labels = json.dumps(["\u82b1", "caf\u00e9", *LABELS[2:]], ensure_ascii=False)
    single(tmp_path / "scripts.onnx", metadata={"labels": labels})
    photo().save(tmp_path / "one.png")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    asked = [sys.executable, str(RUNNER), "scripts.onnx", "one.png"]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u82b1 " in done.stdout and "caf\u00e9 ".encode(encoding) in done.stdout


def test_it_can_be_copied_beside_a_graph(folder: Path, tmp_path: Path) -> None:
    for name in ("flowers.onnx", "one.png"):
        shutil.copy(folder / name, tmp_path / name)
    copy = shutil.copy(RUNNER, tmp_path / "classify.py")
    done = command(tmp_path / "flowers.onnx", tmp_path / "one.png", cwd=folder, runner=copy)
    assert (done.returncode, done.stderr) == (0, "")


def test_torch_is_never_imported(folder: Path) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(EXPORT)!r})
        import run
        assert run.main(["flowers.onnx", "one.png"]) == run.main(["multi.onnx", "one.png", "--task", "hard"]) == 0
        print(sorted({{"torch", "torchvision", "timm", "onnx", "safetensors", "gpt_serve"}} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=folder, text=True, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


REFUSALS: dict[str, tuple[list[str], str]] = {
    "missing graph": (["absent.onnx", "one.png"], "absent.onnx does not exist"),
    "folder": (["multi.bank", "one.png"], "multi.bank does not exist"),
    "text": (["text.onnx", "one.png"], "text.onnx is not an ONNX graph"),
    "empty": (["empty.onnx", "one.png"], "empty.onnx is not an ONNX graph"),
    "foreign": (["foreign.onnx", "one.png"], "foreign.onnx is not a graph of gpt-serve export: its format is 'none'"),
    "newer": (["other.onnx", "one.png"], "its format is 'gpt-serve-onnx/9', not 'gpt-serve-onnx/1'"),
    "no weights": (["large.onnx", "one.png"], "large.onnx needs its weights, a .data file, beside it"),
    "cut weights": (["short.onnx", "one.png"], "short.onnx needs its weights"),
    "missing image": (["flowers.onnx", "absent.png"], "absent.png cannot be read: No such file"),
    "image a folder": (["flowers.onnx", "multi.bank"], "multi.bank cannot be read: Is a directory"),
    "image cut": (["flowers.onnx", "cut.jpg", "--json"], "cut.jpg cannot be read: it is damaged or truncated"),
    "image text": (["flowers.onnx", "note.png"], "note.png cannot be read: it is not a JPEG, PNG or WebP image"),
    "image gif": (["flowers.onnx", "old.gif"], "old.gif cannot be read: it is not a JPEG, PNG or WebP image"),
    "100 megapixels": (["flowers.onnx", "huge.png"], "huge.png has more than the 50 megapixels allowed"),
    "400 megapixels": (["flowers.onnx", "bomb.png"], "bomb.png has more than the 50 megapixels allowed"),
    "other task": (["flowers.onnx", "one.png", "--task", "cars"], "no task cars: it answers for flowers"),
    "no task": (["multi.onnx", "one.png"], "several tasks, name one: gated, hard, probe, shallow"),
    "unknown task": (["multi.onnx", "one.png", "--task", "../x"], "there are gated, hard, probe, shallow"),
    "no bank": (["alone.onnx", "one.png", "--task", "hard"], "no adapters in alone.bank"),
    "other backbone": (["wrong.onnx", "one.png", "--task", "gated"], "backbone 'vit_huge' (cdcdcdcdcdcd), the graph"),
    "hostile header": (
        ["wrong.onnx", "one.png", "--task", "probe"],
        "it claims a header of more than the 1048576 bytes allowed",
    ),
    "cut adapter": (["wrong.onnx", "one.png", "--task", "hard"], "truncated within tensor"),
    "top-k": (["flowers.onnx", "one.png", "--top-k", "0"], "--top-k must be 1 to 1000; try --help"),
    "no images": (["flowers.onnx"], "the following arguments are required: images"),
    "provider": (
        ["flowers.onnx", "one.png", "--providers", "NoSuchProvider"],
        "this onnxruntime has no NoSuchProvider",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_line_and_exit_code_2(folder: Path, name: str) -> None:
    arguments, message = REFUSALS[name]
    done = command(*arguments, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("run.py: ")
    assert message in done.stderr


ELSEWHERE = sorted(set(onnxruntime.get_available_providers()) - {run.CPU})


@pytest.mark.skipif(not ELSEWHERE or torch.cuda.is_available(), reason="needs onnxruntime-gpu without a GPU")
@pytest.mark.parametrize("more", ["", f",{run.CPU}"])
@pytest.mark.parametrize("provider", ELSEWHERE)
def test_a_provider_that_would_silently_be_the_cpu_is_refused(folder: Path, provider: str, more: str) -> None:
    done = command("flowers.onnx", "one.png", "--providers", provider + more, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"{provider} does not run here" in done.stderr
