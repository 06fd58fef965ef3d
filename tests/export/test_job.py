"""From an adapter to a verified file, or to nothing at all."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from gpt_serve.adapters.parse import parse_preprocess
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import BackboneMismatch, DataError, ExportError, UnknownTask, UsageError
from gpt_serve.export import ExportOptions, Graph, add_task, export_task, export_tasks, files, job, verify
from gpt_serve.export.files import bank_folder
from gpt_serve.export.session import _check_placement
from gpt_serve.export.verify import Tally, check_accuracy
from gpt_serve.model.backbone import Backbone
from tests.export.conftest import Exporter
from tests.factories import make_adapter, make_unknown
from tests.tiny_vit import PREPROCESS, tiny_backbone

LABELS = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def store(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("adapters"))
    store.publish(make_adapter(tiny.spec, "alpha", labels=LABELS, unknown=make_unknown(tiny.spec.width)))
    store.publish(make_adapter(tiny.spec, "beta", method="linear", classes=7))
    store.publish(make_adapter(tiny.spec, "deep", method="vpt-deep"))
    store.publish(make_adapter(tiny.spec, "foreign", backbone="vit_huge", backbone_sha256="cd" * 32))
    store.publish(make_adapter(tiny.spec, "tuned", method="full"))
    store.publish(make_adapter(tiny.spec, "cls", pool="cls"))
    other = type(PREPROCESS)(**PREPROCESS.to_dict() | {"mean": (0.1, 0.2, 0.3)})
    store.publish(make_adapter(tiny.spec, "other", preprocess=other))
    return store


@pytest.fixture(scope="module", autouse=True)
def exported_once(exporter: Exporter) -> Iterator[None]:
    """What is tested here begins behind the exporter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "single_graph", exporter.single)
        patch.setattr(job, "multi_graph", exporter.multi)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of two images."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for label in LABELS:
        (root / label).mkdir()
        for index in range(2):
            noise = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / label / f"{index}.png")
    return str(root)


@pytest.fixture(scope="module")
def single(tiny: Backbone, store: AdapterStore, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("single") / "deeper" / "alpha.onnx"
    return export_task(tiny, store, "alpha", output, ExportOptions(data={"alpha": data}))


@pytest.fixture(scope="module")
def multi(tiny: Backbone, store: AdapterStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("multi") / "many.onnx"
    return export_tasks(tiny, store, ["beta", "alpha"], output, ExportOptions())


def test_a_graph_that_does_not_tell_strangers_as_torch_does_is_not_written(
    tiny: Backbone, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "torch_known", lambda *_: lambda images: np.full(len(images), 2.0))
    with pytest.raises(ExportError, match="does not tell strangers as torch does: shares differ by up to"):
        export_task(tiny, store, "alpha", tmp_path / "graph.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_says_all_that_running_it_needs(tiny: Backbone, store: AdapterStore, single: dict[str, Any]) -> None:
    graph = Graph(Path(single["output"]))
    stored = store.load("alpha")
    assert graph.metadata["format"] == "gpt-serve-onnx/1" and graph.metadata["kind"] == "single"
    assert graph.metadata["task"] == "alpha" and graph.metadata["revision"] == stored.revision == single["revision"]
    assert graph.metadata["backbone"] == "tiny" and graph.metadata["backbone_sha256"] == tiny.fingerprint
    assert graph.json("labels") == list(LABELS)
    assert type(PREPROCESS)(**parse_preprocess(graph.metadata["preprocess"])) == PREPROCESS
    assert [graph.metadata[key] for key in ("input", "output", "precision")] == ["uint8", "probabilities", "fp32"]
    assert graph.json("verification") == single["verification"]


def test_verification_is_reported(single: dict[str, Any]) -> None:
    report = single["verification"]
    assert 0 < report["max_abs_difference"] <= 1e-5 and report["top1_agreement"] == 1.0
    assert report["batches"] == [1, 2, 7]
    assert report["images"] == 7 + 7 + 6  # noise, photographs, data
    assert report["accuracy"]["images"] == 6 and report["accuracy"]["torch"] == report["accuracy"]["graph"]
    assert single["size_bytes"] == pytest.approx(Path(single["output"]).stat().st_size, rel=0.02)


def test_nothing_but_the_graph_is_left(single: dict[str, Any]) -> None:
    assert [path.name for path in Path(single["output"]).parent.iterdir()] == ["alpha.onnx"]


def test_many_tasks_and_their_bank(tiny: Backbone, store: AdapterStore, multi: dict[str, Any]) -> None:
    output = Path(multi["output"])
    bank = bank_folder(output, Graph(output).metadata)
    assert sorted(path.name for path in output.parent.iterdir()) == [bank.name, "many.onnx"]
    assert re.fullmatch(r"many\.[0-9a-f]{8}\.bank", bank.name)
    assert multi["tasks"] == {task: store.load(task).revision for task in ("alpha", "beta")}
    for task in ("alpha", "beta"):
        data = (bank / f"{task}.safetensors").read_bytes()
        assert data == (store.root / task / "adapter.safetensors").read_bytes()
    graph = Graph(output)
    assert [graph.metadata[key] for key in ("kind", "pool", "deep")] == ["multi", "mean", "0"]
    report = graph.json("verification")
    assert report["max_abs_difference"] <= 1e-5 and set(report["tasks"]) == {"alpha", "beta"}


def test_a_task_is_added_without_a_new_graph(tiny: Backbone, multi: dict[str, Any], tmp_path: Path) -> None:
    output = Path(multi["output"])
    before = output.read_bytes()
    more = AdapterStore(tmp_path)
    more.publish(make_adapter(tiny.spec, "gamma", prompts=9, classes=11, seed=4))
    result = add_task(tiny, more, "gamma", output)
    assert result["verification"]["max_abs_difference"] <= 1e-5
    assert output.read_bytes() == before
    assert (bank_folder(output, Graph(output).metadata) / "gamma.safetensors").is_file()
    assert result["revision"] == more.load("gamma").revision


def test_what_cannot_be_added(
    tiny: Backbone, store: AdapterStore, single: dict[str, Any], multi: dict[str, Any]
) -> None:
    many, one = Path(multi["output"]), Path(single["output"])
    with pytest.raises(ExportError, match="no place for prompts in every block"):
        add_task(tiny, store, "deep", many)
    with pytest.raises(ExportError, match="is a graph of one task"):
        add_task(tiny, store, "beta", one)
    with pytest.raises(ExportError, match="'cls' pools by cls, the graph by mean"):
        add_task(tiny, store, "cls", many)
    with pytest.raises(ExportError, match="'other' is normalised with other values"):
        add_task(tiny, store, "other", many)
    with pytest.raises(ExportError, match=r"was made on backbone tiny \("):
        add_task(tiny_backbone(depth=2), store, "beta", many)
    with pytest.raises(ExportError, match=r"missing\.onnx does not open"):
        add_task(tiny, store, "beta", many.with_name("missing.onnx"))
    assert not list(many.parent.glob("**/deep*"))


@pytest.mark.parametrize("tasks", [["alpha", "cls"], ["alpha", "other"]])
def test_tasks_that_share_no_graph(tiny: Backbone, store: AdapterStore, tasks: list[str], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="export it alone"):
        export_tasks(tiny, store, tasks, tmp_path / "many.onnx", ExportOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("nobody", UnknownTask, "nobody"),
        ("foreign", BackboneMismatch, "vit_huge"),
        ("tuned", ExportError, "method full"),
    ],
)
def test_adapters_that_cannot_be_exported(
    tiny: Backbone, store: AdapterStore, task: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_task(tiny, store, task, tmp_path / "new" / "graph.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_answers_otherwise_is_not_written(
    tiny: Backbone, store: AdapterStore, exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of an adapter with slightly different temperatures."""
    alpha = store.load("alpha").adapter
    assert alpha.tau is not None
    cold = AdapterStore(tmp_path / "adapters")
    cold.publish(replace(alpha, tau=0.99 * alpha.tau))
    monkeypatch.setattr(job, "single_graph", lambda backbone, _, form: exporter.single(backbone, alpha, form))
    output = tmp_path / "output" / "graph.onnx"
    output.parent.mkdir()
    output.write_text("what was there before")
    with pytest.raises(ExportError, match=r"does not answer as torch does: .* nothing was written"):
        export_task(tiny, cold, "alpha", output)
    assert list(output.parent.iterdir()) == [output]
    assert output.read_text() == "what was there before"


def test_a_disk_that_fills_up_leaves_nothing(
    tiny: Backbone, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.ir, "save", full)
    with pytest.raises(ExportError, match="No space left on device"):
        export_task(tiny, store, "alpha", tmp_path / "graph.onnx")
    assert not list(tmp_path.iterdir())


def test_large_weights_go_beside_the_graph(tiny: Backbone, store: AdapterStore, tmp_path: Path) -> None:
    """And the next export to the same name takes the old ones away."""
    old = export_task(tiny, store, "alpha", tmp_path / "graph.onnx", ExportOptions(external_bytes=0))
    (old_weights,) = tmp_path.glob("graph.*.onnx.data")
    output = tmp_path / "graph.onnx"
    result = export_task(tiny, store, "alpha", output, ExportOptions(external_bytes=0))
    (weights,) = tmp_path.glob("graph.*.onnx.data")
    assert weights != old_weights and old == result
    assert sorted(tmp_path.iterdir()) == [weights, output]
    assert weights.stat().st_size > 0.9 * 4 * sum(p.numel() for p in tiny.model.parameters())
    assert output.stat().st_size + weights.stat().st_size == pytest.approx(result["size_bytes"], rel=0.02)
    onnx.checker.check_model(str(output))
    assert Graph(output).json("verification") == result["verification"]
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match=r"graph\.onnx does not open"):
        Graph(output)


def test_int8(tiny: Backbone, store: AdapterStore, data: str, tmp_path: Path) -> None:
    """With weights beside the graph, so that these are tested as well."""
    output = tmp_path / "graph.onnx"
    options = ExportOptions(precision="int8", data={"alpha": data}, force=True, external_bytes=0)
    result = export_task(tiny, store, "alpha", output, options)
    operators = [node.op_type for node in onnx.load(output).graph.node]
    assert result["nodes"] == len(operators)
    assert operators.count("MatMulInteger") == 18 and operators.count("MatMul") == 2, "all but the head and strangers"
    assert Graph(output).metadata["precision"] == "int8"
    assert 1e-5 < result["verification"]["max_abs_difference"] < 0.5
    assert set(result["verification"]["accuracy"]) == {"torch", "graph", "images"}
    (weights,) = tmp_path.glob("graph.*.onnx.data")
    assert weights.stat().st_size > output.stat().st_size * 0.1


def tally(torch_correct: int, graph_correct: int) -> Tally:
    expected = np.eye(2)[[0] * 1000]
    targets = [0] * torch_correct + [1] * (1000 - torch_correct)
    actual = np.eye(2)[[1 - target if index >= graph_correct else target for index, target in enumerate(targets)]]
    result = Tally()
    result.add(expected, actual, targets)
    return result


def test_int8_that_loses_too_much_is_refused() -> None:
    assert tally(900, 894).accuracy("graph") == 0.894
    check_accuracy(tally(900, 895), 0.5, force=False, task="t")
    check_accuracy(tally(900, 950), 0.5, force=False, task="t")
    check_accuracy(tally(900, 800), 0.5, force=True, task="t")
    with pytest.raises(ExportError, match=r"int8 loses 0\.60 points of accuracy on 't' \(1000 images\), 0\.5 are"):
        check_accuracy(tally(900, 894), 0.5, force=False, task="t")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, UsageError, "int8 measures what it costs: pass --data alpha=DIR"),
        ({"data": {"beta": "x"}}, UsageError, "--data names 'beta', which is not exported"),
        ({"data": {"alpha": "/nowhere"}}, DataError, "no such folder"),
    ],
)
def test_data_that_do_not_fit(
    tiny: Backbone, store: AdapterStore, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_task(tiny, store, "alpha", tmp_path / "graph.onnx", ExportOptions(**options))
    assert not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_read_is_named(
    tiny: Backbone, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "ant").mkdir(parents=True)
    (tmp_path / "data" / "ant" / "bad.png").write_text("no picture")
    with pytest.raises(DataError, match=r"bad\.png.*replace or remove it"):
        export_task(
            tiny, store, "alpha", tmp_path / "graph.onnx", ExportOptions(data={"alpha": str(tmp_path / "data")})
        )
    assert not (tmp_path / "graph.onnx").exists()


@pytest.mark.parametrize("name", ["graph.pt", "folder.onnx", "file/graph.onnx"])
def test_outputs_that_cannot_be_written(tiny: Backbone, store: AdapterStore, name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="--output .*(ends in .onnx|name a file|cannot be written: )"):
        export_task(tiny, store, "alpha", tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def somebody_elses() -> onnx.ModelProto:
    """A graph that adds its input to itself."""
    shape = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "g", shape[:1], shape[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_a_graph_of_somebody_else_is_refused(tmp_path: Path) -> None:
    onnx.save(somebody_elses(), tmp_path / "theirs.onnx")
    with pytest.raises(ExportError, match="is not a graph that gpt-serve exported"):
        Graph(tmp_path / "theirs.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ExportError, match=r"text\.onnx does not open in onnxruntime"):
        Graph(tmp_path / "text.onnx")


def test_cuda_without_a_provider_is_refused(single: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime itself would run on the CPU and say nothing."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="no CUDA provider here"):
        Graph(Path(single["output"]), "cuda")


def test_computing_on_the_cpu_beside_cuda_is_refused(single: dict[str, Any]) -> None:
    """Here everything is on the CPU; without matrix products and the like there would be nothing to refuse."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with pytest.raises(ExportError, match="fell back from CUDA to the CPU for Attention, Conv, Gelu"):
        _check_placement(ort.InferenceSession(single["output"], options, providers=["CPUExecutionProvider"]))
    _check_placement(
        ort.InferenceSession(somebody_elses().SerializeToString(), options, providers=["CPUExecutionProvider"])
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(single: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="CUDA|does not open"):
        Graph(Path(single["output"]), "cuda")


def test_json_is_what_was_reported(single: dict[str, Any]) -> None:
    assert json.loads(json.dumps(single)) == single
