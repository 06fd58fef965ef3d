"""Exported graphs in onnxruntime: they are opened, checked and run here."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt_serve.errors import ExportError
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.heads import probabilities
from gpt_serve.specs import Tap

FORMAT = "gpt-serve-onnx/1"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FATAL = 4  # severity of onnxruntime's log

CUDA_PACKAGE = "onnxruntime-gpu[cuda,cudnn]"
KNOWN = "known"
"""The output for the share of validation images that lie at least as far out, of graphs whose adapter can tell."""
HEAVY = {"Attention", "Conv", "Gelu", "Gemm", "LayerNormalization", "MatMul", "MatMulInteger", "Softmax"}

Array = NDArray[Any]


class Graph:
    """An exported graph, ready to run.

    Args:
        path: the ``.onnx`` file; large weights lie beside it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: for the CPU; None lets onnxruntime choose.

    Raises:
        ExportError: the file cannot be opened, is not ours, or would not run on ``device``.
    """

    def __init__(self, path: Path, device: str = "cpu", threads: int | None = None) -> None:
        self.device = device
        self._session = _open(path, device, threads)
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        if self.metadata.get("format") != FORMAT:
            raise ExportError(f"{path} is not a graph that gpt-serve exported: make one with gpt-serve export")
        self.inputs = {item.name: item.type for item in self._session.get_inputs()}
        self.outputs = [item.name for item in self._session.get_outputs()]

    def place(self, inputs: Mapping[str, Array]) -> dict[str, ort.OrtValue]:
        """Put ``inputs`` on the graph's device, for more than one run."""
        kind, _, number = self.device.partition(":")
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), kind, int(number or 0))
            for name, array in inputs.items()
        }

    def probabilities(self, inputs: Mapping[str, Array | ort.OrtValue]) -> Array:
        """Run the graph as `run` does and return probabilities, also of a graph that gives logits: (B, C) float32."""
        scores = self.run(inputs)
        if self.metadata["output"] == "logits":
            return probabilities(torch.from_numpy(scores), "thresholds" in self.metadata).numpy()
        return scores

    def run(self, inputs: Mapping[str, Array | ort.OrtValue], output: str | None = None) -> Array:
        """Run the graph and return one of its outputs.

        Args:
            inputs: by name; arrays, or what `place` made of them.
            output: its name; None for the first.

        Raises:
            ExportError: the task index is out of range; onnxruntime would take -1 for the last task.
        """
        arrays = {name: value for name, value in inputs.items() if not isinstance(value, ort.OrtValue)}
        values = {**inputs, **self.place(arrays)}
        if "index" in arrays:
            check_index(arrays["index"], values["counts"].shape()[0])
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(output or self.outputs[0], "cpu")
        self._session.run_with_iobinding(binding)
        found: Array = binding.copy_outputs_to_cpu()[0]
        return found

    def json(self, key: str) -> Any:
        """Parse a value of the metadata that holds JSON."""
        return json.loads(self.metadata[key])


def _open(path: Path, device: str, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # Its exceptions say what it would say on stderr.
    ort.set_default_logger_severity(FATAL)
    options.log_severity_level = FATAL
    # Threads that spin between runs take the cores from whatever runs next: decoding, the HTTP process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    providers: list[Any] = [CPU]
    if device != "cpu":
        if CUDA not in ort.get_available_providers():
            raise ExportError(f"onnxruntime has no CUDA provider here: use --device cpu or install {CUDA_PACKAGE}")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers.insert(0, (CUDA, {"device_id": int(device.partition(":")[2] or 0)}))
    try:
        session = ort.InferenceSession(path, options, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's exceptions share no base but this
        raise ExportError(f"{path} does not open in onnxruntime: {_one_line(error)}") from error
    if device != "cpu":
        _check_placement(session)
    return session


def _check_placement(session: ort.InferenceSession) -> None:
    """Refuse a session that onnxruntime, without a word, runs on the CPU after all.

    Arithmetic on shapes belongs there even beside CUDA; what computes does not.
    """
    placed = [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    strays = sorted({operator for provider, operator in placed if provider != CUDA and operator in HEAVY})
    if strays:
        raise ExportError(
            f"onnxruntime fell back from CUDA to the CPU for {', '.join(strays)}: install {CUDA_PACKAGE}, "
            "or use --device cpu"
        )


def serving_taps(depth: int) -> tuple[Tap, ...]:
    """Return all that a linear head may read of a backbone with ``depth`` blocks: what a serving graph puts out."""
    return (
        *(Tap(block, "cls") for block in range(depth)),
        *(Tap(block, "patches") for block in range(depth)),
        Tap(depth - 1, "mean"),
    )


def check_index(index: Array, tasks: int) -> None:
    """Raise `ExportError` unless all of ``index`` are rows of a bank of ``tasks``."""
    if index.size and (index.min() < 0 or index.max() >= tasks):
        raise ExportError(f"task index {index.min()}..{index.max()} is outside of the bank's {tasks} tasks")


def bank_inputs(
    adapters: Sequence[AdapterBatch], heads: Sequence[tuple[Tensor, Tensor]], graph: Graph
) -> dict[str, Array]:
    """Stack the bank of a multi-task graph, see `graphs.MultiTask`, from an ``A = 1`` batch and a head of each task.

    Raises:
        ExportError: prompts for every block, and the graph has no place for them.
    """
    deep = "is_deep" in graph.inputs
    layers = [adapter.layout.layers for adapter in adapters]
    if max(layers) > 1 and not deep:
        raise ExportError("the graph has no place for prompts in every block: export it again with all of its tasks")
    depth = adapters[0].gate.shape[1] + 1
    longest = max(1, *(adapter.prompts for adapter in adapters))
    classes = max(len(bias) for _, bias in heads)
    bank = {
        "prompt": torch.cat([_pad_prompt(adapter.prompt, depth if deep else 1, longest) for adapter in adapters]),
        "counts": torch.tensor([adapter.prompts for adapter in adapters]),
        "gate": torch.cat([adapter.gate for adapter in adapters]),
        "tau": torch.cat([torch.ones(1, depth) if adapter.tau is None else adapter.tau for adapter in adapters]),
        "head_weight": torch.stack([_pad_rows(weight, classes, 0.0) for weight, _ in heads]),
        "head_bias": torch.stack([_pad_rows(bias, classes, float("-inf")) for _, bias in heads]),
    }
    if deep:
        bank["is_deep"] = torch.tensor([count > 1 for count in layers])
    if "mean_pool" in graph.inputs:
        bank["mean_pool"] = torch.tensor([adapter.layout.taps[0].pool != "cls" for adapter in adapters])
    return {name: tensor.cpu().numpy() for name, tensor in bank.items()}


def _pad_prompt(prompt: Tensor, layers: int, length: int) -> Tensor:
    """Pad (1, layers or fewer, length or fewer, D) to (1, layers, length, D) with zeros."""
    return torch.nn.functional.pad(prompt, (0, 0, 0, length - prompt.shape[2], 0, layers - prompt.shape[1]))


def _pad_rows(tensor: Tensor, rows: int, value: float) -> Tensor:
    """Pad (C, ...) to (rows, ...) with ``value``."""
    padded = tensor.new_full((rows, *tensor.shape[1:]), value)
    padded[: len(tensor)] = tensor
    return padded


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
