"""The graphs: one task folded in, or one backbone for a bank of tasks. All of them call the one forward pass.

Shapes: batch ``B``, image ``h`` x ``w``, tasks ``T``, blocks ``L``, width ``D``, prompts ``P``, classes ``C``.
"""

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.unknown import known_share
from gpt_serve.export.fold import fold_backbone, fold_pixels, fold_shifts, fold_temperatures
from gpt_serve.export.session import KNOWN, serving_taps
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch, Layout
from gpt_serve.model.heads import linear, probabilities, stranger_distance
from gpt_serve.model.prompted import embed, prompted_features, remember, tapped_features
from gpt_serve.model.vit import ViT
from gpt_serve.specs import Pool, Tap

OPSET = 23  # the first with an Attention operator
EXAMPLE_BATCH = 2  # a batch of 1 would be taken for a constant
PIXEL_CENTRE = 127.5
NO_LIMIT = 2**62  # bytes: constants of any size are folded

InputKind = Literal["uint8", "float"]
Dynamic = dict[str, dict[int, Any]]


@dataclass(frozen=True)
class Form:
    """What a graph takes, computes in and gives.

    Attributes:
        input: ``uint8``: RGB pixels (B, h, w, 3); ``float``: normalised (B, 3, h, w).
        logits: scores before the softmax instead of probabilities.
        half: weights and activations in float16; inputs and outputs stay as they are.
    """

    input: InputKind = "uint8"
    logits: bool = False
    half: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return torch.float16 if self.half else torch.float32

    @property
    def centre(self) -> float:
        """What is subtracted from pixels before the patch embedding."""
        return PIXEL_CENTRE if self.half else 0.0

    @property
    def output(self) -> str:
        """The output's name."""
        return "logits" if self.logits else "probabilities"


class _Graph(nn.Module):
    """What the graphs of one and of many tasks share: they take pixels and give scores."""

    def __init__(self, model: ViT, form: Form) -> None:
        super().__init__()
        self.model = model.to(form.dtype)
        self.form = form

    def embed(self, images: Tensor) -> Tensor:
        """Turn images as the form takes them into tokens (B, prefix + N, D)."""
        x = images.to(self.form.dtype)
        if self.form.input == "uint8":
            x = x.permute(0, 3, 1, 2)
            if self.form.centre:
                x = x - self.form.centre
        return embed(self.model, x)

    def scores(self, logits: Tensor, multi_label: bool = False) -> Tensor:
        """Return the scores (B, C) in float32: of classes, or of labels of which an image has several."""
        logits = logits.float()
        return logits if self.form.logits else probabilities(logits, multi_label)


class SingleTask(_Graph):
    """Turns ``images`` into the scores of one adapter; everything that does not depend on the images is folded in.

    Where the adapter can tell strangers, also into the share of the validation images that lie at least as far out.
    """

    def __init__(self, backbone: Backbone, adapter: Adapter, form: Form) -> None:
        model = fold_backbone(backbone.model)
        tensors = AdapterBatch.of(adapter, backbone.spec, "cpu")
        if tensors.tau is not None:
            fold_temperatures(model, tensors.tau[0])
        if tensors.shift is not None:
            fold_shifts(model, tensors.shift[0])
        if form.input == "uint8":
            fold_pixels(model, adapter.preprocess, form.centre)
        tensors = remember(model, replace(tensors, tau=None, shift=None))
        super().__init__(model, form)
        self.adapter = _to(tensors, form.dtype)
        self.head_weight = nn.Buffer(adapter.head_weight.to(form.dtype))
        self.head_bias = nn.Buffer(adapter.head_bias.to(form.dtype))
        self.unknown, self.multi_label = adapter.unknown, adapter.threshold is not None
        self.outputs = [form.output] if self.unknown is None else [form.output, KNOWN]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Turn images, (B, h, w, 3) or (B, 3, h, w), into scores (B, C), and shares (B,) if there are any."""
        features = prompted_features(self.model, self.embed(images), self.adapter)
        scores = self.scores(linear(features, self.head_weight, self.head_bias), self.multi_label)
        unknown = self.unknown
        if unknown is None:
            return scores
        # In float32 whatever the form: distances of strangers are beyond what float16 holds.
        distance = stranger_distance(features.float(), unknown.mean, unknown.scale, unknown.basis)
        return scores, known_share(unknown.knots, distance)


class MultiTask(_Graph):
    """Turns ``images`` and the row of each one's task in the bank into scores; the bank's tensors are inputs.

    Args:
        pool: of all tasks; None makes it an input.
        deep: whether tasks may have prompts for every block.
    """

    def __init__(self, backbone: Backbone, pool: Pool | None, deep: bool, form: Form) -> None:
        model = fold_backbone(backbone.model)
        if form.input == "uint8":
            fold_pixels(model, backbone.spec.preprocess, form.centre)
        super().__init__(model, form)
        last = backbone.spec.depth - 1
        pools: tuple[Pool, ...] = ("cls", "mean") if pool is None else (pool,)
        self.layout = _open_layout(backbone, tuple(Tap(last, pool) for pool in pools), deep)

    def forward(
        self,
        images: Tensor,
        index: Tensor,
        prompt: Tensor,
        counts: Tensor,
        gate: Tensor,
        tau: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
        is_deep: Tensor | None = None,
        mean_pool: Tensor | None = None,
    ) -> Tensor:
        """Return the scores (B, C).

        Args:
            images: (B, h, w, 3) uint8, or (B, 3, h, w) normalised, as the form says.
            index: (B,) int64, rows of the bank.
            prompt: (T, 1 or L, P, D), zero-padded.
            counts: (T,) int64, prompts of each task.
            gate: (T, L-1).
            tau: (T, L).
            head_weight: (T, C, D), zero-padded.
            head_bias: (T, C), padded with -inf.
            is_deep: (T,) bool, in a deep graph.
            mean_pool: (T,) bool, in a graph for both kinds of pooling.
        """
        bank = AdapterBatch(prompt, gate, tau, self.layout, deep=is_deep, counts=counts)
        adapter = _to(_rows(bank, index), self.form.dtype)
        tapped = tapped_features(self.model, self.embed(images), adapter)
        features = tapped[0] if mean_pool is None else torch.where(mean_pool[index, None], tapped[1], tapped[0])
        logits = torch.matmul(head_weight[index], features.float()[:, :, None])[..., 0] + head_bias[index]
        return self.scores(logits)


class Features(_Graph):
    """Turns ``images`` and each one's prompts, gates, temperatures and shifts into features for a server's bank."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(fold_backbone(backbone.model), Form(input="float"))
        self.layout = _open_layout(backbone, serving_taps(backbone.spec.depth), deep=False)

    def forward(
        self, images: Tensor, prompt: Tensor, counts: Tensor, gate: Tensor, tau: Tensor, shift: Tensor
    ) -> Tensor:
        """Return the features (B, T, D) of the `serving_taps`, in their order.

        Args:
            images: (B, 3, h, w) normalised.
            prompt: (B, 1, P, D), zero-padded.
            counts: (B,) int64, prompts of each row.
            gate: (B, L-1).
            tau: (B, L).
            shift: (B, L, 3, D).
        """
        adapter = AdapterBatch(prompt, gate, tau, self.layout, shift=shift, counts=counts)
        return torch.stack(tapped_features(self.model, self.embed(images), adapter), dim=1)


def _open_layout(backbone: Backbone, taps: tuple[Tap, ...], deep: bool) -> Layout:
    """Return the layout that assumes nothing of any row: each gate may be open, each temperature another one."""
    depth = backbone.spec.depth
    return Layout((False,) * (depth - 1), taps, layers=depth if deep else 1, prompts=1, tempered=True)


def _rows(bank: AdapterBatch, index: Tensor) -> AdapterBatch:
    """Take rows ``index`` (B,) of a bank without keys and values, so that ``A`` becomes ``B``."""
    return replace(
        bank,
        prompt=bank.prompt[index],
        gate=bank.gate[index],
        tau=None if bank.tau is None else bank.tau[index],
        deep=None if bank.deep is None else bank.deep[index],
        counts=None if bank.counts is None else bank.counts[index],
    )


def features_graph(backbone: Backbone) -> ir.Model:
    """Make the graph of a server, see `Features`."""
    spec, prompts = backbone.spec, 4
    example = {
        "images": _example_images(backbone, Form(input="float")),
        "prompt": torch.zeros(EXAMPLE_BATCH, 1, prompts, spec.width),
        "counts": torch.full((EXAMPLE_BATCH,), prompts),
        "gate": torch.zeros(EXAMPLE_BATCH, spec.depth - 1),
        "tau": torch.ones(EXAMPLE_BATCH, spec.depth),
        "shift": torch.zeros(EXAMPLE_BATCH, spec.depth, 3, spec.width),
    }
    batch, longest = torch.export.Dim("batch"), torch.export.Dim("prompts")
    dynamic: Dynamic = {name: {0: batch} for name in example}
    dynamic["prompt"][2] = longest
    return to_onnx(Features(backbone), example, ["features"], dynamic)


def single_graph(backbone: Backbone, adapter: Adapter, form: Form) -> ir.Model:
    """Make the folded graph of one task, which turns ``images`` into ``probabilities`` or ``logits``."""
    graph = SingleTask(backbone, adapter, form)
    example = {"images": _example_images(backbone, form)}
    return to_onnx(graph, example, graph.outputs, {"images": {0: torch.export.Dim("batch")}})


def multi_graph(backbone: Backbone, pool: Pool | None, deep: bool, form: Form) -> ir.Model:
    """Make the graph that serves every task of a bank, see `MultiTask`."""
    graph = MultiTask(backbone, pool, deep, form)
    spec, tasks, prompts, classes = backbone.spec, 3, 4, 5
    example = {
        "images": _example_images(backbone, form),
        "index": torch.zeros(EXAMPLE_BATCH, dtype=torch.int64),
        "prompt": torch.zeros(tasks, spec.depth if deep else 1, prompts, spec.width),
        "counts": torch.full((tasks,), prompts),
        "gate": torch.zeros(tasks, spec.depth - 1),
        "tau": torch.ones(tasks, spec.depth),
        "head_weight": torch.zeros(tasks, classes, spec.width),
        "head_bias": torch.zeros(tasks, classes),
    }
    if deep:
        example["is_deep"] = torch.zeros(tasks, dtype=torch.bool)
    if pool is None:
        example["mean_pool"] = torch.zeros(tasks, dtype=torch.bool)
    batch, bank, longest, most = (torch.export.Dim(name) for name in ("batch", "tasks", "prompts", "classes"))
    dynamic: Dynamic = {name: {0: bank} for name in example} | {"images": {0: batch}, "index": {0: batch}}
    dynamic["prompt"][2] = longest
    dynamic["head_weight"][1] = dynamic["head_bias"][1] = most
    return to_onnx(graph, example, [form.output], dynamic)


def to_onnx(module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], dynamic: Dynamic) -> ir.Model:
    """Trace ``module`` with named inputs; whatever is constant is computed now."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter about its own insides
        program = torch.onnx.export(
            module.eval(),
            kwargs=dict(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        onnxscript.optimizer.optimize_ir(program.model, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
    _check_dynamic(program.model, dynamic)
    _forget_origins(program.model)
    return program.model


def _check_dynamic(model: ir.Model, dynamic: Dynamic) -> None:
    """Refuse a graph of fixed size: where code depends on a size, torch takes the example's without a word."""
    for value in model.graph.inputs:
        assert value.name is not None and value.shape is not None
        fixed = [axis for axis in dynamic.get(value.name, {}) if isinstance(value.shape[axis], int)]
        if fixed:
            raise RuntimeError(f"axis {fixed[0]} of {value.name} was taken for a constant")


def _forget_origins(model: ir.Model) -> None:
    """Drop the exporter's notes, which name source files of this machine."""
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _example_images(backbone: Backbone, form: Form) -> Tensor:
    height, width = backbone.spec.preprocess.input_size
    if form.input == "uint8":
        return torch.zeros(EXAMPLE_BATCH, height, width, 3, dtype=torch.uint8)
    return torch.zeros(EXAMPLE_BATCH, 3, height, width)


def _to(adapter: AdapterBatch, dtype: torch.dtype) -> AdapterBatch:
    """Return the adapter's tensors in the type of the graph."""
    return replace(
        adapter,
        prompt=adapter.prompt.to(dtype),
        gate=adapter.gate.to(dtype),
        tau=None if adapter.tau is None else adapter.tau.to(dtype),
        kv=tuple((keys.to(dtype), values.to(dtype)) for keys, values in adapter.kv),
    )
