"""Small graphs with the inputs, outputs and metadata of exported ones, built by hand in milliseconds.

They compute something simple that every input takes part in, so that what a runner feeds can be checked against the
slow, obvious `single_probabilities` and `multi_probabilities`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.specs import BackboneSpec, Preprocess
from tests.factories import TINY_SPEC, make_adapter

Array = NDArray[Any]

LABELS = ("ant", "bee", "cow")
REVISION = "0123456789ab"


def single(
    path: Path,
    *,
    labels: Sequence[str] = LABELS,
    preprocess: Preprocess = TINY_SPEC.preprocess,
    kind: str = "uint8",
    output: str = "probabilities",
    external: bool = False,
    metadata: Mapping[str, str | None] | None = None,
    known: float | None = None,
) -> Path:
    """Write a single-task graph.

    Args:
        kind: ``uint8`` or ``float``, the input.
        output: ``probabilities`` or ``logits``.
        external: whether the weights go to ``<name>.data`` beside it.
        metadata: what to change in it; None drops a key.
        known: what it says of every image, as a graph does that can tell strangers.
    """
    height, width = preprocess.input_size
    size = f"batch, {height}, {width}, 3" if kind == "uint8" else f"batch, 3, {height}, {width}"
    softmax = "probabilities = Softmax<axis = -1>(logits)" if output == "probabilities" else ""
    text = f"""stand_in ({"uint8" if kind == "uint8" else "float"}[{size}] images)
        => (float[batch, {len(labels)}] {output}{", float[batch] known" if known is not None else ""}) {{
        {_PIXELS if kind == "uint8" else _NORMALIZED}
        logits = MatMul(flat, weight)
        {softmax}
        {_SHARES if known is not None else ""}
    }}"""
    weight = _noise(height * width * 3, len(labels))
    values = {
        "format": "gpt-serve-onnx/1",
        "kind": "single",
        "task": "flowers",
        "revision": REVISION,
        "backbone": TINY_SPEC.name,
        "backbone_sha256": TINY_SPEC.fingerprint,
        "labels": json.dumps(labels),
        "preprocess": json.dumps(preprocess.to_dict()),
        "input": kind,
        "output": output,
        "precision": "fp32",
        "verification": json.dumps({"max_abs_difference": 0.0, "top1_agreement": 1.0, "images": 1, "batches": [1]}),
    }
    arrays = {"weight": weight} | _scaling(preprocess)
    if known is not None:
        arrays |= {"last_axis": np.array([-1]), "share": np.array(known, np.float32)}
    return _save(path, text, arrays, values | dict(metadata or {}), external)


def single_probabilities(pixels: Array, *, classes: int = 3, preprocess: Preprocess = TINY_SPEC.preprocess) -> Array:
    """What `single` answers: uint8 (B, H, W, 3) to (B, C)."""
    return _softmax(_flat(pixels, preprocess) @ _noise(pixels[0].size, classes))


def multi(
    path: Path,
    adapters: Sequence[Adapter],
    *,
    deep: bool = False,
    spec: BackboneSpec = TINY_SPEC,
    external: bool = False,
) -> Path:
    """Write a multi-task graph, and beside it the bank folder with ``adapters``; ``external`` as for `single`."""
    height, width = spec.preprocess.input_size
    layers = spec.depth if deep else 1
    text = f"""stand_in (
        uint8[batch, {height}, {width}, 3] images, int64[batch] index,
        float[tasks, {layers}, prompts, {spec.width}] prompt, int64[tasks] counts, float[tasks, {spec.depth - 1}] gate,
        float[tasks, {spec.depth}] tau, float[tasks, classes, {spec.width}] head_weight, float[tasks, classes] head_bias
        {", bool[tasks] is_deep" if deep else ""}
    ) => (float[batch, classes] probabilities) {{
        {_PIXELS}
        embedded = MatMul(flat, embedding)
        {_PROMPTS}
        {_DEEP if deep else "read = ReduceSum<keepdims = 0>(summed, first_axis)"}
        {_HEAD}
    }}"""
    weights = {
        "embedding": _noise(height * width * 3, spec.width),
        "gate_weight": _noise(spec.depth - 1, 1),
        "tau_weight": _noise(spec.depth, 1),
        "one": np.float32(1),
        "start": np.int64(0),
        "step": np.int64(1),
        "first_axis": np.array([1]),
        "second_axis": np.array([2]),
        "around_axes": np.array([1, 3]),
        "length_axis": np.int64(2),
    }
    metadata = {
        "format": "gpt-serve-onnx/1",
        "kind": "multi",
        "backbone": spec.name,
        "backbone_sha256": spec.fingerprint,
        "pool": spec.pool,
        "deep": str(int(deep)),
        "preprocess": json.dumps(spec.preprocess.to_dict()),
        "input": "uint8",
        "output": "probabilities",
        "precision": "fp32",
        "verification": json.dumps({"max_abs_difference": 0.0, "top1_agreement": 1.0, "images": 1, "batches": [1]}),
    }
    bank = path.with_suffix(".bank")
    bank.mkdir(parents=True)
    for adapter in adapters:
        (bank / f"{adapter.task}.safetensors").write_bytes(adapter.to_bytes())
    return _save(path, text, weights | _scaling(spec.preprocess), metadata, external)


def multi_probabilities(adapter: Adapter, pixels: Array, spec: BackboneSpec = TINY_SPEC) -> Array:
    """What `multi` answers for images of one task: uint8 (B, H, W, 3) to (B, C), without any padding."""
    features = _flat(pixels, spec.preprocess) @ _noise(pixels[0].size, spec.width)
    gate = np.full(spec.depth - 1, 0.0 if adapter.deep else 1.0, np.float32)
    if adapter.gamma is not None:
        gate = adapter.gamma.sigmoid().numpy()
    tau = np.ones(spec.depth, np.float32) if adapter.tau is None else adapter.tau.numpy()
    if adapter.prompt is not None:
        features = features + (gate @ _noise(spec.depth - 1, 1)) * (adapter.prompt.numpy() + 1).sum(axis=(0, 1))
    features = features + tau @ _noise(spec.depth, 1)
    return _softmax(features @ adapter.head_weight.numpy().T + adapter.head_bias.numpy())


def some_adapters(deep: bool) -> list[Adapter]:
    """Tasks of every method, with different numbers of prompts and classes; ``deep``: also prompts for every block."""
    adapters = [
        make_adapter(task="gated", prompts=4, classes=5),
        make_adapter(task="probe", method="linear", classes=2, seed=1),
        make_adapter(task="shallow", method="vpt-shallow", prompts=7, seed=2),
        make_adapter(task="hard", method="gated-hard", prompts=1, classes=9, seed=3),
    ]
    if deep:
        adapters.append(make_adapter(task="vpt", method="vpt-deep", prompts=2, seed=4))
        adapters.append(make_adapter(task="zz", deep=True, prompts=6, seed=5))
    return adapters


_PIXELS = """
    pixels = Cast<to = 1>(images)
    scaled = Div(pixels, full)
    centred = Sub(scaled, mean)
    normal = Div(centred, std)
    flat = Flatten(normal)
"""
_SHARES = """
    best = ReduceMax<keepdims = 0>(logits, last_axis)
    nothing = Sub(best, best)
    known = Add(nothing, share)
"""
_NORMALIZED = """
    normal = Transpose<perm = [0, 2, 3, 1]>(images)
    flat = Flatten(normal)
"""
_PROMPTS = """
    rows = Gather(prompt, index)
    size = Shape(prompt)
    length = Gather(size, length_axis)
    position = Range(start, length, step)
    count = Gather(counts, index)
    count_column = Unsqueeze(count, first_axis)
    is_real = Less(position, count_column)
    real = Cast<to = 1>(is_real)
    real_rows = Unsqueeze(real, around_axes)
    shifted = Add(rows, one)
    masked = Mul(shifted, real_rows)
    summed = ReduceSum<keepdims = 0>(masked, second_axis)
"""
_DEEP = """
    every = ReduceSum<keepdims = 0>(summed, first_axis)
    only = Gather<axis = 1>(summed, start)
    own_deep = Gather(is_deep, index)
    deep_column = Unsqueeze(own_deep, first_axis)
    read = Where(deep_column, every, only)
"""
_HEAD = """
    own_gate = Gather(gate, index)
    openness = MatMul(own_gate, gate_weight)
    own_tau = Gather(tau, index)
    heat = MatMul(own_tau, tau_weight)
    gated = Mul(openness, read)
    prompted = Add(embedded, gated)
    features = Add(prompted, heat)
    column = Unsqueeze(features, second_axis)
    own_weight = Gather(head_weight, index)
    product = MatMul(own_weight, column)
    unbiased = Squeeze(product, second_axis)
    own_bias = Gather(head_bias, index)
    logits = Add(unbiased, own_bias)
    probabilities = Softmax<axis = -1>(logits)
"""


def _save(
    path: Path, text: str, weights: Mapping[str, Any], metadata: Mapping[str, str | None], external: bool = False
) -> Path:
    graph = onnx.parser.parse_graph(text)
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(weights[name]), name) for name in used & set(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    helper.set_model_props(model, {key: value for key, value in metadata.items() if value is not None})
    onnx.checker.check_model(model)
    options = {"location": f"{path.name}.data", "size_threshold": 1000} if external else {}
    onnx.save(model, path, save_as_external_data=external, **options)
    return path


def _scaling(preprocess: Preprocess) -> dict[str, Array]:
    mean, std = np.array(preprocess.mean, np.float32), np.array(preprocess.std, np.float32)
    return {"full": np.asarray(np.float32(255)), "mean": mean, "std": std}


def _flat(pixels: Array, preprocess: Preprocess) -> Array:
    scaling = _scaling(preprocess)
    normal = (pixels.astype(np.float32) / 255 - scaling["mean"]) / scaling["std"]
    flat: Array = normal.reshape(len(pixels), -1)
    return flat


def _noise(rows: int, columns: int) -> Array:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32) / np.sqrt(np.float32(rows))


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = powers / powers.sum(axis=1, keepdims=True)
    return result
