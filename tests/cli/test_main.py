"""The command line: one JSON object on stdout, one line for a mistake, no traceback."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from gpt_serve import __version__
from gpt_serve.adapters.store import FILE_NAME, AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from tests.factories import make_adapter, make_segmenter

LABELS = ("ant", "bee", "cow")
COMMANDS = (
    *("train", "sweep", "close-gates", "calibrate", "eval", "predict", "serve"),
    *("tasks", "inspect", "reconstruct", "bench", "export", "push", "pull", "deploy", "keys", "backbones"),
)


@pytest.fixture(scope="module")
def prepared(bundled: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters and images."""
    root = tmp_path_factory.mktemp("cli")
    store = AdapterStore(root / "adapters")
    small = {"head_weight": 0.1 * torch.randn(3, 192, generator=torch.Generator().manual_seed(0)), "labels": LABELS}
    store.publish(make_adapter(bundled.spec, "alpha", **small))
    store.publish(make_adapter(bundled.spec, "probe", method="linear", labels=LABELS, training={"epochs": 3}))
    store.publish(make_adapter(bundled.spec, "foreign", backbone="vit_huge", backbone_sha256="cd" * 32))
    (root / "adapters" / "corrupt").mkdir()
    (root / "adapters" / "corrupt" / FILE_NAME).write_bytes(b"not an adapter\n")
    for number, label in enumerate(LABELS):
        (root / "data" / "test" / label).mkdir(parents=True)
        for index in range(2):
            noise = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(10 * number + index))
            Image.fromarray(noise.to(torch.uint8).numpy()).save(root / "data" / "test" / label / f"{index}.png")
    shutil.copy(root / "data" / "test" / "ant" / "0.png", root / "one.png")
    shutil.copy(root / "data" / "test" / "bee" / "1.png", root / "two.png")
    (root / "text.png").write_text("not an image")
    (root / "cut.png").write_bytes((root / "one.png").read_bytes()[:500])
    (root / "empty").mkdir()
    return root


@pytest.fixture
def folder(prepared: Path, bundled: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`prepared` as the working folder; the bundled backbone is loaded once for all tests."""
    load = Backbone.load

    def reuse(name: str, **options: Any) -> Backbone:
        usual = name == bundled.name and options["device"] == "cpu"
        return bundled if usual and not options["checkpoint"] and not options["input_size"] else load(name, **options)

    monkeypatch.chdir(prepared)
    monkeypatch.setattr(Backbone, "load", reuse)
    return prepared


def run(*args: str) -> Result:
    return CliRunner(catch_exceptions=False).invoke(main, args, prog_name="gpt-serve")


def run_cpu(command: str, *args: str) -> Result:
    return run(command, "--device", "cpu", *args)


def run_json(*args: str) -> dict[str, Any]:
    """The one JSON object on stdout, of a run that says nothing else."""
    result = run(*args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("\n")
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def process(*args: str, **options: Any) -> subprocess.Popen[str]:
    """``gpt-serve`` as the user starts it, in a process of its own."""
    program = "from gpt_serve.cli.main import main; main(prog_name='gpt-serve')"
    command = [sys.executable, "-c", program, *args]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options)


# predict


def test_predict_json_is_what_the_engine_says(folder, bundled):
    value = run_json("predict", "--device", "cpu", "--task", "alpha", "one.png", "two.png")
    engine = Engine(bundled, AdapterStore("adapters"))
    assert value["task"] == "alpha"
    assert [item["image"] for item in value["images"]] == ["one.png", "two.png"]
    for item in value["images"]:
        (expected,) = engine.predict([("alpha", Path(item["image"]).read_bytes())])
        assert item["revision"] == expected.revision
        assert [entry["label"] for entry in item["predictions"]] == [label for label, _ in expected.top(3)]
        shown = [entry["probability"] for entry in item["predictions"]]
        assert shown == pytest.approx([value for _, value in expected.top(3)], abs=1e-5)


def test_predict_top_k(folder):
    value = run_json("predict", "--device", "cpu", "--task", "alpha", "--top-k", "1", "one.png")
    assert [len(item["predictions"]) for item in value["images"]] == [1]


def test_predict_prints_a_line_per_image(folder):
    result = run_cpu("predict", "--task", "alpha", "two.png", "one.png", "two.png")
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr, len(lines)) == (0, "", 3)
    assert [line.split(": ")[0] for line in lines] == ["two.png", "one.png", "two.png"]
    assert all(all(label in line for label in LABELS) and line.count("%") == 3 for line in lines)


def test_predict_takes_any_file_name(folder):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy("one.png", name)
    assert run_cpu("predict", "--task", "alpha", name).exit_code == 0
    assert run_json("predict", "--device", "cpu", "--task", "alpha", name)["images"][0]["image"] == name


def test_images_that_cannot_be_read_take_nothing_from_the_others(folder, monkeypatch):
    monkeypatch.setattr("gpt_serve.cli.predict.CHUNK", 2)
    given = ("one.png", "cut.png", "none.png", "data", "two.png")
    result = run_cpu("predict", "--task", "alpha", *given)
    assert result.exit_code == 1
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == ["one.png", "two.png"]
    assert result.stderr.splitlines() == [
        "gpt-serve: cut.png: PNG image is damaged or truncated: save it anew and send that",
        "gpt-serve: none.png: cannot be read: No such file or directory",
        "gpt-serve: data: cannot be read: Is a directory",
    ]
    told = run_cpu("predict", "--task", "alpha", *given, "--json")
    assert (told.exit_code, told.stderr, told.stdout.count("\n")) == (1, result.stderr, 1)
    entries = json.loads(told.stdout)["images"]
    assert [entry["image"] for entry in entries] == list(given)
    assert ["error" in entry for entry in entries] == [False, True, True, True, False]
    assert entries[2] == {"image": "none.png", "error": "cannot be read: No such file or directory"}
    assert len(entries[4]["predictions"]) == 3


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_predict_takes_what_training_takes(folder, tmp_path, kind):
    with Image.open("one.png") as image:
        image.quantize(16).convert("RGB").save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        image.save(tmp_path / "other", kind)
    answers = run_json(
        "predict", "--device", "cpu", "--task", "alpha", *map(str, (tmp_path / "x.png", tmp_path / "other"))
    )
    first, second = (entry["predictions"] for entry in answers["images"])
    assert first == second


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_labels_of_any_script_can_be_shown_anywhere(folder, bundled, tmp_path, monkeypatch, encoding):
    store = AdapterStore(tmp_path / "adapters")
    store.publish(make_adapter(bundled.spec, "scripts", labels=("\u82b1", "caf\u00e9")))
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding=encoding))
    options = ["predict", "--device", "cpu", "--task", "scripts", "--adapters", str(store.root), "one.png"]
    assert main(options, standalone_mode=False) is None
    sys.stdout.flush()
    text = shown.getvalue().decode(encoding)
    assert "\\u82b1 " in text and "caf\u00e9 " in text


def test_predict_several_tasks(folder, bundled):
    tasks = ("alpha", "probe")
    value = run_json("predict", "--device", "cpu", "--task", "alpha", "--task", "probe", "one.png", "two.png")
    assert value["tasks"] == [*tasks] and [entry["image"] for entry in value["images"]] == ["one.png", "two.png"]
    for entry in value["images"]:
        for task, answer in zip(tasks, entry["answers"], strict=True):
            (alone,) = run_json("predict", "--device", "cpu", "--task", task, entry["image"])["images"]
            assert answer["task"] == task and answer["revision"] == alone["revision"]
            labels = [[item["label"] for item in one["predictions"]] for one in (answer, alone)]
            assert labels[0] == labels[1]
    result = run_cpu("predict", "--task", "alpha", "--task", "probe", "text.png", "one.png")
    assert result.exit_code == 1
    told = [line.removeprefix("gpt-serve: ").split(": ")[:2] for line in (result.stdout + result.stderr).splitlines()]
    assert told == [[image, task] for image in ("one.png", "text.png") for task in tasks]
    twice = run_cpu("predict", "--task", "alpha", "--task", "alpha", "one.png")
    assert twice.exit_code == 2 and "a --task is given twice: give each once" in twice.stderr


def test_predict_writes_masks(folder, bundled, tmp_path):
    store = AdapterStore(tmp_path / "store")
    revision = store.publish(make_segmenter(bundled.spec, "roads", mode="windows"))
    store.publish(make_adapter(bundled.spec, "alpha"))
    options = ("--device", "cpu", "--adapters", str(store.root), "--masks", str(tmp_path / "masks"))
    (entry,) = run_json("predict", *options, "--task", "roads", "one.png")["images"]
    (expected,) = Engine(bundled, store).predict([("roads", Path("one.png").read_bytes())])
    height, width = expected.size
    assert (entry["revision"], entry["width"], entry["height"]) == (revision, width, height)
    assert entry["kind"] == "segmentation" and entry["mask"] == str(tmp_path / "masks" / "one.roads.png")
    with Image.open(entry["mask"]) as mask:
        assert mask.mode == "P" and (np.asarray(mask) != expected.mask).mean() < 1e-3
    assert [item["share"] for item in entry["classes"]] == pytest.approx(expected.shares.tolist(), abs=1e-3)
    both = run("predict", *options, "--task", "roads", "--task", "alpha", "--top-k", "1", "one.png")
    first, second = both.stdout.splitlines()
    assert first.startswith("one.png: roads: ") and first.endswith("one.roads.png") and second.count(" %") == 1
    Path("sub").mkdir()
    shutil.copy("one.png", "sub/one.png")
    for images, says in (
        (["one.png", "sub/one.png"], "one.png and sub/one.png would both write"),
        (["--top-k", "2", "one.png"], "'roads' answers with a mask of all its classes: leave out --top-k"),
        (["--masks", "one.png", "one.png"], "--masks"),
    ):
        refused = run("predict", *options, "--task", "roads", *images)
        assert refused.exit_code == 2 and says in refused.stderr and len(refused.stderr.splitlines()) == 1


# predict --input --output


def test_predict_a_folder_into_a_table(folder, tmp_path):
    output = tmp_path / "out.parquet"
    result = run_cpu(
        "predict", "--task", "alpha", "--task", "probe", "--input", "data", "--output", str(output), "--json"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "tasks": ["alpha", "probe"],
        "output": str(output),
        "images": 6,
        "rows": 12,
        "errors": 0,
    }
    rows = pq.read_table(output).to_pylist()
    shown = run_json("predict", "--device", "cpu", "--task", "alpha", "data/test/ant/0.png")["images"][0]
    assert rows[0]["image"] == "test/ant/0.png" and rows[0]["revision"] == shown["revision"]
    assert rows[0]["label"] == shown["predictions"][0]["label"]


def test_predict_tells_by_its_exit_code_that_images_were_broken(folder, tmp_path):
    (tmp_path / "some").mkdir()
    shutil.copy("cut.png", tmp_path / "some")
    args = ("predict", "--task", "alpha", "--input", str(tmp_path / "some"), "--output", str(tmp_path / "out.parquet"))
    assert run_cpu(*args).exit_code == 2
    shutil.copy("one.png", tmp_path / "some")
    result = run_cpu(*args)
    assert result.exit_code == 1 and "2 rows of 2 images, 1 with an error" in result.stdout


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "name what to classify: IMAGES, or --input with --output"),
        (["one.png", "--input", "data", "--output", "x.parquet"], "name what to classify"),
        (["--input", "data"], "name what to classify"),
        (["--input", "data", "--output", "x.csv"], "--output x.csv: the name of a table of results ends in .parquet"),
        (["--input", "empty", "--output", "x.parquet"], "--input empty holds no images"),
        (["--input", "data", "--output", "x.parquet", "--task", "alpha"], "a --task is given twice"),
        (["--input", "data", "--output", "x.parquet", "--task", "nobody"], "unknown task 'nobody'"),
    ],
)
def test_mistakes_about_bulk_are_one_line(folder, args, line):
    result = run_cpu("predict", "--task", "alpha", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"gpt-serve: {line}") and result.stderr.count("\n") == 1
    assert not Path("x.parquet").exists() and not list(Path().glob(".x*"))


# adapters elsewhere


@pytest.fixture
def elsewhere(folder, tmp_path, monkeypatch) -> str:
    """The address of a store that has alpha."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = f"file://{tmp_path}/shared"
    assert run_json("push", "--task", "alpha", address)["files"] == [FILE_NAME]
    return address


def test_a_store_elsewhere_answers_as_the_folder_does(elsewhere, monkeypatch, tmp_path):
    for command in (["eval", "--data", "data"], ["predict", "one.png"], ["inspect", "--plot", str(tmp_path / "p.png")]):
        name, *rest = command
        here = run_json(name, *(["--device", "cpu"] if name != "inspect" else []), "--task", "alpha", *rest)
        there = run_json(
            name, *(["--device", "cpu"] if name != "inspect" else []), "--task", "alpha", *rest, "--adapters", elsewhere
        )
        assert there == here
    (entry,) = run_json("tasks", "--adapters", elsewhere)["tasks"]
    assert entry in run_json("tasks")["tasks"]


def test_pull_brings_what_push_took(elsewhere, tmp_path):
    run_json("pull", "--task", "alpha", elsewhere, "--adapters", str(tmp_path / "other"))
    assert (tmp_path / "other" / "alpha" / FILE_NAME).read_bytes() == Path("adapters/alpha", FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["tasks", "--adapters", "ftp://x/y"], "ftp://x/y is no address of adapters: use a folder, s3://bucket/prefix"),
        (
            ["train", "--task", "x", "--adapters", "s3://models/team"],
            "Invalid value for '--adapters': s3://models/team is not a folder",
        ),
        (["push", "--task", "corrupt", "file:///nowhere"], "adapter 'corrupt' is refused: not a safetensors file"),
        (["pull", "--task", "nobody", "ADDRESS"], "there is no task 'nobody' in file://"),
    ],
)
def test_mistakes_about_stores_are_one_line(elsewhere, command, line):
    result = run(*[elsewhere if word == "ADDRESS" else word for word in command])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"gpt-serve: {line}") and result.stderr.count("\n") == 1


# eval


def test_eval_json(folder, bundled):
    value = run_json("eval", "--device", "cpu", "--task", "alpha", "--data", "data")
    engine = Engine(bundled, AdapterStore("adapters"))
    paths = sorted(Path("data/test").glob("*/*.png"))
    results = engine.predict([("alpha", path.read_bytes()) for path in paths])
    hits = [result.top(1)[0][0] == path.parent.name for path, result in zip(paths, results, strict=True)]
    expected = {"task": "alpha", "revision": results[0].revision, "accuracy": sum(hits) / 6, "n": 6}
    assert value == pytest.approx(expected)


def test_eval_prints_a_line(folder):
    accuracy = run_json("eval", "--device", "cpu", "--task", "alpha", "--data", "data")["accuracy"]
    result = run_cpu("eval", "--task", "alpha", "--data", "data/test")
    revision = AdapterStore("adapters").load("alpha").revision
    assert result.stdout == f"alpha: accuracy {100 * accuracy:.2f} % on 6 images ({revision})\n"


# tasks


def test_tasks_json(folder):
    items = run_json("tasks")["tasks"]
    assert [item["task"] for item in items] == ["alpha", "corrupt", "foreign", "probe"]
    revision = AdapterStore("adapters").load("alpha").revision
    size = Path("adapters/alpha", FILE_NAME).stat().st_size
    assert items[0] == {
        "task": "alpha",
        "kind": "classification",
        "method": "gated",
        "backbone": "mae-vit-tiny-32",
        "classes": 3,
        "prompts": 3,
        "size_bytes": size,
        "revision": revision,
        "val_accuracy": 0.75,
        "val_miou": None,
        "created": "2026-01-02T03:04:05Z",
    }
    assert set(items[1]) == {"task", "error"} and "adapter 'corrupt' is refused" in items[1]["error"]
    assert items[3]["val_accuracy"] is None


def test_tasks_table(folder):
    result = run("tasks")
    assert (result.exit_code, result.stderr) == (0, "")
    header, alpha, corrupt, foreign, probe = result.stdout.splitlines()
    assert header.split() == ["task", "method", "backbone", "classes", "size", "revision", "val"]
    assert alpha.split()[:4] == ["alpha", "gated", "mae-vit-tiny-32", "3"] and alpha.endswith("75.0 %")
    assert corrupt.startswith("corrupt") and "refused: " in corrupt
    assert "vit_huge" in foreign
    assert probe.endswith(" -")


# inspect


def test_inspect_json(folder, tmp_path):
    path = tmp_path / "gates.png"
    value = run_json("inspect", "--task", "alpha", "--plot", str(path))
    stored = AdapterStore("adapters").load("alpha")
    assert (value["task"], value["revision"], value["plot"]) == ("alpha", stored.revision, str(path))
    assert value["gates"] == pytest.approx(stored.adapter.gamma.double().sigmoid().tolist())
    assert value["temperatures"] == pytest.approx(stored.adapter.tau.tolist())
    assert sum(value["selection_ratio"]) == pytest.approx(1)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_inspect_table_and_default_plot(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("inspect", "--task", "alpha", "--adapters", str(folder / "adapters"))
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines[0].startswith("alpha: gated, 3 prompts, revision ")
    assert [line.split(" | ")[0] for line in lines[3:15]] == [f"| {block}" for block in range(1, 13)]
    assert lines[-1] == "plot: alpha-gates.png"
    assert (tmp_path / "alpha-gates.png").is_file()


def test_inspect_method_without_gates(folder, tmp_path):
    result = run("inspect", "--task", "probe", "--plot", str(tmp_path / "x.png"))
    assert "This method learns no gates and no temperatures." in result.stdout


@pytest.mark.slow
def test_inspect_with_an_image(folder, tmp_path):
    value = run_json("inspect", "--task", "alpha", "--plot", str(tmp_path / "x.png"), "--image", "one.png")["attention"]
    assert (value["image"], value["query"], value["blocks"]) == ("one.png", "mean", [3, 7, 12])
    assert value["plot"] == str(tmp_path / "alpha-attention.png")
    assert [len(value[name]) for name in ("on_prompts", "entropy", "entropy_without")] == [12, 12, 12]
    assert all(0 < share < 1 for share in value["on_prompts"])
    result = run("inspect", "--task", "alpha", "--plot", str(tmp_path / "y.png"), "--image", "one.png", "--heads")
    assert f"| 12 | {value['on_prompts'][-1]:.4f} | {value['entropy'][-1]:.3f} |" in result.stdout
    written = {path.name: path.read_bytes()[:4] for path in tmp_path.iterdir()}
    assert written == dict.fromkeys(["x.png", "y.png", "alpha-attention.png"], b"\x89PNG")


def test_inspect_nmi(folder, bundled, tmp_path):
    curves = [[epoch / 100 + block / 10_000 for block in range(12)] for epoch in range(40)]
    store = AdapterStore(tmp_path / "adapters")
    store.publish(make_adapter(bundled.spec, "alpha", training={"nmi": curves}))
    common = ("inspect", "--task", "alpha", "--adapters", str(store.root), "--plot", str(tmp_path / "x.png"), "--nmi")
    assert run_json(*common)["nmi"] == {"epochs": curves, "plot": str(tmp_path / "alpha-nmi.png")}
    lines = run(*common).stdout.splitlines()
    assert "| NMI of block | epoch 1 | epoch 9 | epoch 17 | epoch 24 | epoch 32 | epoch 40 |" in lines
    assert "| 12 | 0.0011 | 0.0811 | 0.1611 | 0.2311 | 0.3111 | 0.3911 |" in lines
    assert (tmp_path / "alpha-nmi.png").is_file()


# reconstruct


@pytest.mark.slow
def test_reconstruct(folder, tmp_path):
    path = tmp_path / "r.png"
    common = ("reconstruct", "--image", "one.png", "--steps", "2", "--output", str(path))
    value = run_json(*common, "--task", "alpha", "--block", "2", "--block", "1")
    assert (value["image"], value["steps"], value["plot"]) == ("one.png", 2, str(path))
    found = [(item["task"], item["block"]) for item in value["blocks"]]
    assert found == [(None, 2), (None, 1), ("alpha", 2), ("alpha", 1)]
    assert value["blocks"][0]["error"] != value["blocks"][2]["error"]
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = run(*common).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["block", "3", "7", "12", "plot:"]


def test_reconstruct_needs_a_library(folder, monkeypatch):
    from gpt_serve.insight import reconstruct as deep_image_prior

    monkeypatch.setattr(deep_image_prior, "find_spec", lambda name: None)
    result = run("reconstruct", "--image", "one.png", "--output", "x.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "gpt-serve: reconstruct needs torchmetrics: pip install 'gpt-serve[insight]'\n"


# Mistakes

MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown task": (["predict", "--task", "nobody", "one.png"], "unknown task 'nobody': train it"),
    "unknown task of eval": (["eval", "--task", "nobody", "--data", "data"], "unknown task 'nobody': train it"),
    "unknown task of inspect": (["inspect", "--task", "nobody"], "unknown task 'nobody': train it"),
    "invalid name": (["predict", "--task", "../alpha", "one.png"], "task name '../alpha' is not allowed: use"),
    "invalid name of train": (["train", "--task", "A b", "--data", "data"], "task name 'A b' is not allowed: use"),
    "two lines in a name": (["predict", "--task", "a\nb", "one.png"], r"task name 'a\nb' is not allowed"),
    "missing image": (["predict", "--task", "alpha", "none.png"], "none.png: cannot be read: No such file"),
    "folder for an image": (["predict", "--task", "alpha", "data"], "data: cannot be read: Is a directory"),
    "not an image": (["predict", "--task", "alpha", "text.png"], "text.png: file is not a JPEG, PNG or WebP image"),
    "unknown backbone": (
        ["predict", "--task", "alpha", "--backbone", "vit_nope", "one.png"],
        "unknown backbone 'vit_nope': use 'mae-vit-tiny-32', 'vit-small-14' or a timm model name",
    ),
    "unsupported backbone": (
        ["predict", "--task", "alpha", "--backbone", "resnet18", "one.png"],
        "backbone 'resnet18' is not supported: ResNet is not a plain Vision Transformer",
    ),
    "missing checkpoint": (
        ["predict", "--task", "alpha", "--checkpoint", "none.pth", "one.png"],
        "checkpoint none.pth does not exist",
    ),
    "checkpoint that is none": (
        ["predict", "--task", "alpha", "--checkpoint", "text.png", "one.png"],
        "checkpoint text.png cannot be read",
    ),
    "input size": (["predict", "--task", "alpha", "--input-size", "30", "one.png"], "input size 30 is not a multiple"),
    "no such cuda device": (
        ["predict", "--task", "alpha", "--device", "cuda:99", "one.png"],
        "device 'cuda:99' cannot be used here: use cpu or auto",
    ),
    "no device at all": (
        ["predict", "--task", "alpha", "--device", "meta", "one.png"],
        "--device meta is not a device: use auto, cpu, cuda or cuda:N",
    ),
    "foreign adapter": (
        ["predict", "--task", "foreign", "one.png"],
        "adapter 'foreign' is refused: trained on backbone vit_huge (cdcdcdcdcdcd), not on mae-vit-tiny-32 (35d41c0de1",
    ),
    "foreign adapter of eval": (
        ["eval", "--task", "foreign", "--data", "data"],
        "adapter 'foreign' is refused: trained on backbone vit_huge",
    ),
    "nothing to close": (
        ["close-gates", "--task", "probe", "--data", "data"],
        "adapter 'probe' learns no gates (method linear): there is nothing to close",
    ),
    "closing without a record": (
        ["close-gates", "--task", "alpha", "--data", "data"],
        "adapter 'alpha' does not tell how it was trained: train it with gpt-serve train",
    ),
    "closing gates of a foreign adapter": (
        ["close-gates", "--task", "foreign", "--data", "data"],
        "adapter 'foreign' is refused: trained on backbone vit_huge",
    ),
    "closing gates of nobody": (["close-gates", "--task", "nobody", "--data", "data"], "unknown task 'nobody'"),
    "closing at no cost": (
        ["close-gates", "--task", "alpha", "--data", "data", "--tolerance", "-1"],
        "--tolerance must lie between 0 and 100 percentage points, not -1.0",
    ),
    "calibrating without a record": (
        ["calibrate", "--task", "probe", "--data", "data"],
        "adapter 'probe' does not tell how it was trained: train it with gpt-serve train",
    ),
    "calibrating nobody": (["calibrate", "--task", "nobody", "--data", "data"], "unknown task 'nobody'"),
    "training gates that are not there": (
        ["train", "--task", "a", "--data", "data", "--method", "linear", "--close-gates"],
        "--close-gates: the method linear learns no gates: leave it out",
    ),
    "corrupt adapter": (["predict", "--task", "corrupt", "one.png"], "adapter 'corrupt' is refused: "),
    "corrupt adapter of inspect": (["inspect", "--task", "corrupt"], "adapter 'corrupt' is refused: "),
    "unwritable plot": (
        ["inspect", "--task", "alpha", "--plot", "none/x.png"],
        "the plot cannot be written to none/x.png: No such file or directory",
    ),
    "plot of no format": (
        ["inspect", "--task", "alpha", "--plot", "x.tool"],
        "the plot cannot be written to x.tool: 'tool' is none of ",
    ),
    "two plots in a file": (
        ["inspect", "--task", "alpha", "--nmi", "--plot", "alpha-nmi.png"],
        "--plot alpha-nmi.png: that is where --nmi puts its plot: name another file",
    ),
    "folder for a plot": (["inspect", "--task", "alpha", "--plot", "data"], "File 'data' is a directory"),
    "heads of no image": (
        ["inspect", "--task", "alpha", "--heads"],
        "--heads is about attention maps: name an --image",
    ),
    "no image to inspect": (["inspect", "--task", "alpha", "--image", "text.png"], "text.png: file is not a JPEG, PNG"),
    "other backbone to inspect": (
        ["inspect", "--task", "foreign", "--image", "one.png"],
        "trained on backbone vit_huge (cdcdcdcdcdcd), not on mae-vit-tiny-32",
    ),
    "no NMI recorded": (["inspect", "--task", "alpha", "--nmi"], "alpha was trained without: train with --nmi"),
    "NMI of no prompts": (
        ["train", "--task", "a", "--data", "data", "--method", "linear", "--nmi"],
        "--nmi: the method linear has no prompts: leave it out",
    ),
    "reconstruct no image": (["reconstruct", "--image", "cut.png", "--output", "r.png"], "cut.png: "),
    "reconstruct an unknown task": (
        ["reconstruct", "--image", "one.png", "--output", "r.png", "--task", "nobody"],
        "unknown task 'nobody': train it",
    ),
    "reconstruct from no block": (
        ["reconstruct", "--image", "one.png", "--output", "r.png", "--block", "13"],
        "--block 13: mae-vit-tiny-32 has blocks 1 to 12",
    ),
    "reconstruct to nowhere": (
        ["reconstruct", "--image", "one.png", "--output", "none/r.png"],
        "the plot cannot be written to none/r.png: No such file or directory",
    ),
    "reconstruct too little": (
        ["reconstruct", "--image", "one.png", "--output", "r.png", "--input-size", "8"],
        "an input of 8 pixels is too small: use --input-size 16 or more",
    ),
    "no adapters": (["tasks", "--adapters", "empty"], "no adapters in empty: train one, or name another place"),
    "no adapter folder": (["tasks", "--adapters", "none"], "no adapters in none: train one, or name another place"),
    "file for a folder": (["tasks", "--adapters", "one.png"], "Directory 'one.png' is a file"),
    "no data": (["eval", "--task", "alpha", "--data", "none"], "--data none: no such folder"),
    "data without classes": (["eval", "--task", "alpha", "--data", "empty"], "--data empty: holds no class folders"),
    "top-k of none": (["predict", "--task", "alpha", "--top-k", "0", "one.png"], "0 is not in the range 1<=x<=1000"),
    "no command": (["prdict"], "No such command 'prdict'"),
    "unknown option of the program": (["--jsno", "tasks"], "No such option"),
    "unknown option of a command": (["tasks", "--jsno"], "No such option"),
    "missing option": (["predict", "one.png"], "Missing option '--task'. Try 'gpt-serve predict --help'."),
    "missing argument": (["predict", "--task", "alpha"], "name what to classify: IMAGES, or --input with --output"),
    "extra argument": (["tasks", "more"], "Got unexpected extra argument (more)"),
    "missing value": (["predict", "one.png", "--task"], "Option '--task' requires an argument"),
    "wrong choice": (["train", "--task", "a", "--data", "d", "--method", "x"], "Invalid value for '--method'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(folder, name):
    args, reason = MISTAKES[name]
    if args[0] in ("predict", "eval", "close-gates", "calibrate") and "--device" not in args:
        args = [*args[:1], "--device", "cpu", *args[1:]]
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("gpt-serve: ") and reason in result.stderr
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 400


@pytest.mark.parametrize("name", ["unknown task", "not an image", "missing option"])
def test_mistake_prints_no_json(folder, name):
    result = run(*MISTAKES[name][0], "--json")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_image_that_vanishes(folder, monkeypatch):
    def vanish(path: Path) -> bytes:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", vanish)
    result = run_cpu("predict", "--task", "alpha", "one.png")
    assert (result.exit_code, result.stderr) == (2, "gpt-serve: one.png: cannot be read: No such file or directory\n")


def test_backbone_is_not_loaded_for_an_unknown_task(folder, monkeypatch):
    monkeypatch.setattr(Backbone, "load", lambda *args, **options: pytest.fail("the backbone was loaded"))
    assert run_cpu("predict", "--task", "nobody", "one.png").exit_code == 2


def test_a_bug_is_not_taken_for_a_mistake(folder, monkeypatch):
    monkeypatch.setattr(Engine, "predict", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cpu("predict", "--task", "alpha", "one.png")


def test_interrupted(folder, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "predict", interrupt)
    result = run_cpu("predict", "--task", "alpha", "one.png")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "gpt-serve: interrupted\n")


# As a process


def closed_pipe(args: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a process whose stdout nobody reads any more, as after ``| head``."""
    reader, writer = os.pipe()
    os.close(reader)
    with process(*args, stdout=writer) as running:
        os.close(writer)
        stderr = running.communicate(timeout=100)[1]
    return running.returncode, stderr


@pytest.mark.parametrize("args", [["tasks", "--json"], ["--help"]], ids=" ".join)
def test_broken_pipe_is_silent(folder, args):
    code, stderr = closed_pipe(args)
    assert (code, stderr) == (1, "")


@pytest.mark.slow
def test_mistake_in_a_process(folder):
    """Nothing that is imported on the way adds a warning of its own."""
    with process("predict", "--task", "alpha", "--device", "cuda:99", "one.png", stdout=subprocess.PIPE) as running:
        stdout, stderr = running.communicate(timeout=100)
    assert (running.returncode, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("gpt-serve: device 'cuda:99' cannot be used here: use cpu or auto")


def cpu_seconds(program: str) -> float:
    """What a fresh process spends on it; unlike the time that passes, other work on the machine hardly adds to it."""
    report = "; import os, sys; times = os.times(); sys.stderr.write(str(times.user + times.system))"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, check=True)
    return float(done.stderr)


def test_help_is_instant():
    bare = cpu_seconds("import click, json")
    shown = cpu_seconds("from gpt_serve.cli.main import main; main(['train', '--help'], standalone_mode=False)")
    assert shown < bare + 0.5  # torch alone takes longer than this


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command):
    result = run(command, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: gpt-serve {command} ")
    options = [param for param in main.commands[command].params if param.param_type_name == "option"]
    assert all(option.help for option in options)


def test_help_lists_every_command():
    result = run("--help")
    assert set(main.commands) == set(COMMANDS)
    assert result.exit_code == 0 and all(f"\n  {command} " in result.stdout for command in COMMANDS)


def test_without_a_command_help_is_shown():
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: gpt-serve ")


def test_version():
    assert run("--version").stdout == f"gpt-serve, version {__version__}\n"


def test_backbones_are_listed() -> None:
    listed = run_json("backbones")["backbones"]
    assert [(entry["name"], entry["bundled"]) for entry in listed[:3]] == [
        ("vit-small-14", True),
        ("mae-vit-tiny-32", True),
        ("vit_small_patch14_reg4_dinov2.lvd142m", False),
    ]
    lines = run("backbones").stdout.splitlines()
    assert len(lines) == 1 + len(listed)
    for line, entry in zip(lines[1:], listed, strict=True):
        assert line.startswith(entry["name"]) and entry["licence"] in line and entry["pool"] in line
