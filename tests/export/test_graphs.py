"""Exported graphs, run by onnxruntime, against the slow reference of the paper's equations."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.unknown import known_share
from gpt_serve.errors import ExportError
from gpt_serve.export import graphs
from gpt_serve.export.graphs import Form, single_graph
from gpt_serve.export.session import Graph, bank_inputs, check_index
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.specs import Pool
from tests import reference
from tests.export.conftest import Exporter
from tests.export.running import open_graph
from tests.factories import make_adapter, make_unknown
from tests.tiny_vit import PREPROCESS, tiny_backbone

INF = float("inf")


def pixels(count: int) -> Tensor:
    """uint8 (count, 3, 16, 16)."""
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def normalized(images: Tensor) -> Tensor:
    return normalize(images, torch.tensor([PREPROCESS.mean]), torch.tensor([PREPROCESS.std]))


def expected_logits(backbone: Backbone, adapter: Adapter, images: Tensor) -> np.ndarray:
    """The slow reference, image by image."""
    learned = {"prompt": adapter.prompt, "gamma": adapter.gamma, "tau": adapter.tau}
    head = {"head_weight": adapter.head_weight, "head_bias": adapter.head_bias}
    results = [
        reference.forward(backbone.model, image, pool=adapter.pool, **head, **learned) for image in normalized(images)
    ]
    return torch.stack([result.logits for result in results]).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(dim=1).numpy()


def nhwc(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.fixture(scope="module")
def shallow(tiny: Backbone, exporter: Exporter, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """For any number of tasks on the tiny backbone, mean pooling, without prompts in every block."""
    return open_graph(exporter.multi(tiny, "mean", False, Form()), tmp_path_factory.mktemp("shallow"))


@dataclass(frozen=True)
class Case:
    """An adapter and how it is exported; with 3 prompts, and 17 prefix and patch rows unless there are registers.

    Attributes:
        rows: that reach the MLP of each block.
    """

    adapter: dict[str, Any]
    rows: list[int]
    pool: Pool = "mean"
    vit: dict[str, Any] = field(default_factory=dict)
    form: Form = Form()

    def backbone(self) -> Backbone:
        return tiny_backbone(self.pool, **self.vit)

    def made(self) -> Adapter:
        return make_adapter(self.backbone().spec, "alpha", labels=("ant", "bee", "cow"), **self.adapter)


REGISTERS = {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.5}
CASES = {
    "gated": Case({"unknown": make_unknown(24)}, [20, 20, 20]),
    "deep, registers": Case(
        {"method": "vpt-deep", "threshold": torch.full((3,), 0.5)}, [20, 1], "cls", {"depth": 2} | REGISTERS
    ),
    "all closed, qk_norm": Case({"gamma": torch.tensor([-INF, -INF])}, [17, 17, 1], "cls", {"qk_norm": True}),
    "linear, float to logits": Case({"method": "linear"}, [17, 17], vit={"depth": 2}, form=Form("float", logits=True)),
    "closed first, half": Case(
        {"gamma": torch.tensor([-INF, 0.5]), "unknown": make_unknown(24)}, [17, 20, 20], form=Form(half=True)
    ),
}
"""Few graphs, because each takes seconds; "gated" is also that of test_job.py."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def model(case: Case, exporter: Exporter) -> ir.Model:
    return exporter.single(case.backbone(), case.made(), case.form)


def test_one_task_equals_the_reference(case: Case, model: ir.Model) -> None:
    images = pixels(7)
    inputs = nhwc(images) if case.form.input == "uint8" else normalized(images).numpy()
    logits = expected_logits(case.backbone(), case.made(), images)
    several = case.made().threshold is not None
    scores = 1 / (1 + np.exp(-logits)) if several else softmax(logits)
    expected = logits if case.form.logits else scores
    assert model.graph.outputs[0].name == case.form.output
    for batch in (1, 2, 7):
        actual = run(model, images=inputs[:batch])
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected[:batch], atol=2e-2 if case.form.half else 1e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("gated", 1e-4), ("closed first, half", 0.01)])
def test_the_graph_tells_strangers_as_the_reference_does(exporter: Exporter, name: str, tolerance: float) -> None:
    case = CASES[name]
    backbone, adapter, images = case.backbone(), case.made(), pixels(7)
    graph = ort.InferenceSession(
        ir.to_proto(exporter.single(backbone, adapter, case.form)).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    assert [item.name for item in graph.get_outputs()] == ["probabilities", "known"]
    (known,) = graph.run(["known"], {"images": nhwc(images)})
    eye = torch.eye(backbone.spec.width)
    bare = replace(adapter, head_weight=eye, head_bias=torch.zeros(len(eye)))
    offset = torch.from_numpy(expected_logits(backbone, bare, images)) - adapter.unknown.mean
    unknown = adapter.unknown
    distances = (offset * unknown.scale).square().sum(1) - (offset @ unknown.basis.T).square().sum(1)
    low, high = (known_share(unknown.knots, distances * factor) for factor in (1 + tolerance, 1 - tolerance))
    assert known.shape == (7,) and 0 < known.mean() < 1
    assert (low.numpy() <= known).all() and (known <= high.numpy()).all()


def test_closed_gates_and_pooling_drop_rows(case: Case, model: ir.Model) -> None:
    """The rows (axis 1) that each activation puts out."""
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    shapes = {info.name: info.type.tensor_type.shape.dim for info in proto.graph.value_info}
    rows = [shapes[node.output[0]][1].dim_value for node in proto.graph.node if node.op_type == "Gelu"]
    assert rows == case.rows


def test_only_standard_operators_and_no_traces_of_this_machine(case: Case, model: ir.Model) -> None:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [item.version for item in proto.opset_import if item.domain == ""] == [23]
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("Attention") == len(case.rows)
    folded = {"Div", "Clip"} | ({"Sigmoid"} if case.made().threshold is None else set())  # labels end in a sigmoid
    assert not folded & set(operators), "gates and temperatures are folded"
    assert str(Path(__file__).parents[2]).encode() not in proto.SerializeToString()


@pytest.mark.parametrize("case", [CASES["closed first, half"]], ids=["half"])
def test_float16_is_half_the_size(case: Case, model: ir.Model) -> None:
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert weights < 0.55 * 4 * sum(parameter.numel() for parameter in case.backbone().model.parameters())


BANK = {
    "gated": {},
    "short": {"prompts": 1, "seed": 5},
    "linear": {"method": "linear", "classes": 2},
    "many": {"method": "vpt-shallow", "prompts": 6, "classes": 9},
}


def bank_of(adapters: list[Adapter], backbone: Backbone, graph: Graph) -> dict[str, np.ndarray]:
    tensors = [AdapterBatch.of(adapter, backbone.spec, "cpu") for adapter in adapters]
    return bank_inputs(tensors, [(adapter.head_weight, adapter.head_bias) for adapter in adapters], graph)


@pytest.mark.parametrize(
    ("deep", "pool"),
    [(False, "mean"), *(pytest.param(*form, marks=pytest.mark.slow) for form in [(False, "cls"), (True, None)])],
)
def test_many_tasks_in_one_batch_equal_the_reference(
    deep: bool, pool: Pool | None, exporter: Exporter, shallow: Graph, tmp_path: Path
) -> None:
    backbone = tiny_backbone(pool or "mean", **({} if pool == "mean" else {"depth": 2}))
    adapters = [make_adapter(backbone.spec, name, **options) for name, options in BANK.items()]
    if deep:
        adapters.append(make_adapter(backbone.spec, "deep", method="gated-deep"))
    if pool is None:
        adapters.append(make_adapter(backbone.spec, "other", pool="cls"))
    shared = not deep and pool == "mean"
    graph = shallow if shared else open_graph(exporter.multi(backbone, pool, deep, Form()), tmp_path)
    bank = bank_of(adapters, backbone, graph)
    index = np.array([2, 0, len(adapters) - 1, 3, 1, 0, 3])
    actual = graph.probabilities({"images": nhwc(pixels(7)), "index": index, **bank})
    for row, slot in enumerate(index):
        adapter = adapters[slot]
        expected = softmax(expected_logits(backbone, adapter, pixels(7)[row : row + 1]))[0]
        np.testing.assert_allclose(actual[row, : len(expected)], expected, atol=1e-5)
        assert not actual[row, len(expected) :].any(), "classes that the task has not"
    one = {name: values[2:3] for name, values in bank.items()}  # a bank of one, a batch of one
    alone = graph.probabilities({"images": nhwc(pixels(1)), "index": np.array([0]), **one})
    np.testing.assert_allclose(alone[0], actual[0], atol=1e-6)


def test_a_bank_of_linear_probes_alone(tiny: Backbone, shallow: Graph) -> None:
    """No task has a prompt; the graph still wants a row of them."""
    adapters = [make_adapter(tiny.spec, "a", method="linear"), make_adapter(tiny.spec, "b", method="linear", seed=9)]
    bank = bank_of(adapters, tiny, shallow)
    assert bank["prompt"].shape == (2, 1, 1, 24) and not bank["counts"].any()
    actual = shallow.probabilities({"images": nhwc(pixels(2)), "index": np.array([1, 1]), **bank})
    np.testing.assert_allclose(actual, softmax(expected_logits(tiny, adapters[1], pixels(2))), atol=1e-5)


def test_a_shallow_graph_refuses_deep_prompts(tiny: Backbone, shallow: Graph) -> None:
    with pytest.raises(ExportError, match="no place for prompts in every block"):
        bank_of([make_adapter(tiny.spec, method="vpt-deep")], tiny, shallow)


@pytest.mark.parametrize("index", [[-1], [0, 3], [99]])
def test_an_index_outside_of_the_bank_is_refused(index: list[int]) -> None:
    with pytest.raises(ExportError, match="outside of the bank's 3 tasks"):
        check_index(np.array(index), 3)


def test_the_index_is_checked_before_the_run(tiny: Backbone, shallow: Graph) -> None:
    bank = bank_of([make_adapter(tiny.spec)], tiny, shallow)
    with pytest.raises(ExportError, match="outside"):
        shallow.probabilities({"images": nhwc(pixels(1)), "index": np.array([-1]), **bank})


def test_an_axis_that_became_a_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch specialises such an axis in silence."""
    scores = graphs.SingleTask.scores
    fixed = lambda self, logits, *rest: scores(self, logits.reshape(len(logits), -1), *rest)  # noqa: E731
    monkeypatch.setattr(graphs.SingleTask, "scores", fixed)
    backbone = tiny_backbone(depth=1)
    with pytest.raises(RuntimeError, match="axis 0 of images was taken for a constant"):
        single_graph(backbone, make_adapter(backbone.spec, method="linear"), Form())
