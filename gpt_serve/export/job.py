"""From adapters to verified graphs on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore, StoredAdapter
from gpt_serve.errors import ExportError, UsageError
from gpt_serve.export.files import (
    BANK_SUFFIX,
    EXTERNAL_BYTES,
    bank_folder,
    count_nodes,
    quantize,
    save,
    set_metadata,
    staged,
)
from gpt_serve.export.graphs import Form, InputKind, multi_graph, single_graph
from gpt_serve.export.session import FORMAT, KNOWN, Array, Graph, bank_inputs
from gpt_serve.export.verify import Answer, Tally, check, check_accuracy, verify
from gpt_serve.files import replacing
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.train.data.datasets import open_evaluation

Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        input: ``uint8`` RGB pixels (B, h, w, 3), or ``float``: normalised (B, 3, h, w).
        logits: scores before the softmax instead of probabilities.
        data: image folders by task, for verification; int8 needs one for each task.
        max_drop: percentage points of accuracy that int8 may lose.
        force: keep an int8 graph that loses more.
        external_bytes: weights of more bytes go to a file of their own.
    """

    input: InputKind = "uint8"
    logits: bool = False
    precision: Precision = "fp32"
    data: Mapping[str, str] | None = None
    max_drop: float = 0.5
    force: bool = False
    external_bytes: int = EXTERNAL_BYTES

    @property
    def form(self) -> Form:
        """The form of the graph before quantization."""
        return Form(self.input, self.logits, self.precision == "fp16")

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise `UsageError` or `DataError` unless there are data for ``adapters``, as far as they are needed."""
        tasks = [adapter.task for adapter in adapters]
        given = set(self.data or {})
        if unknown := sorted(given - set(tasks)):
            raise UsageError(f"--data names {unknown[0]!r}, which is not exported: use one of {', '.join(tasks)}")
        if self.precision == "int8" and (missing := sorted(set(tasks) - given)):
            raise UsageError(
                f"int8 measures what it costs: pass --data {missing[0]}=DIR with test images of {missing[0]!r}"
            )
        for adapter in adapters:
            if adapter.task in given:
                open_evaluation((self.data or {})[adapter.task], adapter.labels)


def export_task(
    backbone: Backbone, store: AdapterStore, task: str, output: Path, options: ExportOptions = ExportOptions()
) -> dict[str, Any]:
    """Write the folded graph of one task, verified; nothing is written unless it answers as torch does.

    Returns:
        ``task``, ``revision``, ``output``, ``size_bytes``, ``nodes`` and the ``verification``.

    Raises:
        AdapterError: the adapter cannot be used with this backbone.
        ExportError: ``output`` cannot be written, or the graph does not answer as torch does.
    """
    stored = _load(backbone, store, task)
    adapter, revision = stored.adapter, stored.revision
    if adapter.kind != "classification":
        raise ExportError(f"task {task!r} answers with masks, which graphs do not hold")
    options.check([adapter])
    with staged(output) as folder:
        path = folder / output.name
        metadata = _metadata(backbone, "single", options) | {
            "task": task,
            "revision": revision,
            "labels": json.dumps(adapter.labels, ensure_ascii=False),
            "preprocess": json.dumps(adapter.preprocess.to_dict()),
        }
        if adapter.threshold is not None:
            metadata["thresholds"] = json.dumps(adapter.threshold.tolist())
        model = single_graph(backbone, adapter, options.form)
        save(model, path, metadata, options.external_bytes)
        nodes = _finish(path, options)
        graph = Graph(path)
        known = None if KNOWN not in graph.outputs else _single_answer(graph, adapter, KNOWN)
        tally = _verify(backbone, adapter, _single_answer(graph, adapter), options, known)
        set_metadata(path, metadata | {"verification": json.dumps(tally.to_dict())})
        size = _size(folder)
    return {
        "task": task,
        "revision": revision,
        "output": str(output),
        "size_bytes": size,
        "nodes": nodes,
        "verification": tally.to_dict(),
    }


def export_tasks(
    backbone: Backbone, store: AdapterStore, tasks: Sequence[str], output: Path, options: ExportOptions
) -> dict[str, Any]:
    """Write one graph for many tasks and its bank, verified task by task and mixed.

    Returns:
        ``tasks`` (name to revision), ``output``, ``size_bytes``, ``nodes`` and the ``verification`` by task.

    Raises:
        AdapterError, ExportError: as `export_task`.
        UsageError: the graph takes pixels only.
    """
    if options.input != "uint8":
        raise UsageError("a graph for many tasks takes uint8 pixels: leave --input out, or export one --task")
    loaded = {task: _load(backbone, store, task) for task in sorted(set(tasks))}
    adapters = {task: stored.adapter for task, stored in loaded.items()}
    options.check(list(adapters.values()))
    pool = next(iter(adapters.values())).pool
    for adapter in adapters.values():
        _check_shared(adapter, backbone, pool)
    deep = any(adapter.deep for adapter in adapters.values())
    with staged(output) as folder:
        path = folder / output.name
        metadata = _metadata(backbone, "multi", options) | {
            "preprocess": json.dumps(backbone.spec.preprocess.to_dict()),
            "pool": pool,
            "deep": str(int(deep)),
        }
        model = multi_graph(backbone, pool, deep, options.form)
        save(model, path, metadata, options.external_bytes)
        nodes = _finish(path, options)
        tallies = _verify_bank(backbone, Graph(path), adapters, options)
        reports = {task: tally.to_dict() for task, tally in tallies.items()}
        set_metadata(path, metadata | {"verification": json.dumps(_worst(tallies) | {"tasks": reports})})
        bank = path.with_suffix(BANK_SUFFIX)
        bank.mkdir()
        for stored in loaded.values():
            _write_bank_file(bank, stored)
        size = _size(folder)
    revisions = {task: stored.revision for task, stored in loaded.items()}
    return {"tasks": revisions, "output": str(output), "size_bytes": size, "nodes": nodes, "verification": reports}


def add_task(
    backbone: Backbone, store: AdapterStore, task: str, graph: Path, options: ExportOptions = ExportOptions()
) -> dict[str, Any]:
    """Put one more task, or a new revision of one, into the bank of an exported graph; the graph stays as it is.

    Raises:
        AdapterError: as `export_task`.
        ExportError: the graph is not one for many tasks of this backbone, or has no place for this adapter.
    """
    opened = Graph(graph)
    if opened.metadata["kind"] != "multi":
        raise ExportError(f"{graph} is a graph of one task: export it again with --tasks to add more")
    height, width = json.loads(opened.metadata["preprocess"])["input_size"]
    if not backbone.spec.fits(opened.metadata["backbone_sha256"], (height, width)):
        named = backbone.spec.told_from(
            opened.metadata["backbone"], opened.metadata["backbone_sha256"], (height, width)
        )
        raise ExportError(f"{graph} was made on backbone {named}, or export it again")
    options = replace(options, precision=opened.metadata["precision"])  # type: ignore[arg-type]
    stored = _load(backbone, store, task)
    adapter = stored.adapter
    options.check([adapter])
    _check_shared(adapter, backbone, opened.metadata["pool"])
    tally = _verify_bank(backbone, opened, {task: adapter}, options)[task]
    bank = bank_folder(graph, opened.metadata)
    try:
        bank.mkdir(exist_ok=True)
        _write_bank_file(bank, stored)
    except OSError as error:
        raise ExportError(f"{bank} cannot be written: {error.strerror}") from error
    return {"task": task, "revision": stored.revision, "output": str(graph), "verification": tally.to_dict()}


def _load(backbone: Backbone, store: AdapterStore, task: str) -> StoredAdapter:
    stored = store.load(task, backbone.spec)
    if stored.adapter.method == "full":
        raise ExportError(f"{task!r} was trained with method full, which is no adapter: export the fine-tuned model")
    return stored


def _metadata(backbone: Backbone, kind: str, options: ExportOptions) -> dict[str, str]:
    resized = backbone.spec.resized_fingerprint
    return ({} if resized is None else {"resized_sha256": resized}) | {
        "format": FORMAT,
        "kind": kind,
        "backbone": backbone.name,
        "backbone_sha256": backbone.fingerprint,
        "input": options.input,
        "output": options.form.output,
        "precision": options.precision,
    }


def _finish(path: Path, options: ExportOptions) -> int:
    """Quantize the graph if the options say so; return its number of nodes."""
    if options.precision == "int8":
        quantize(path, options.external_bytes)
    return count_nodes(path)


def _verify(
    backbone: Backbone, adapter: Adapter, answer: Answer, options: ExportOptions, known: Answer | None = None
) -> Tally:
    tally = verify(backbone, adapter, answer, (options.data or {}).get(adapter.task), known)
    check(tally, options.precision, adapter.task)
    if options.precision == "int8":
        check_accuracy(tally, options.max_drop, options.force, adapter.task)
    return tally


def _verify_bank(
    backbone: Backbone, graph: Graph, adapters: Mapping[str, Adapter], options: ExportOptions
) -> dict[str, Tally]:
    """Verify each task in batches that it shares with the next one of the bank."""
    tensors = [AdapterBatch.of(adapter, backbone.spec, "cpu") for adapter in adapters.values()]
    heads = [(adapter.head_weight, adapter.head_bias) for adapter in adapters.values()]
    bank = bank_inputs(tensors, heads, graph)
    return {
        task: _verify(backbone, adapter, _mixed_answer(graph, bank, row, len(adapter.labels)), options)
        for row, (task, adapter) in enumerate(adapters.items())
    }


def _single_answer(graph: Graph, adapter: Adapter, output: str | None = None) -> Answer:
    """Answer with the graph's probabilities, or with another ``output``."""
    mean, std = (torch.tensor([values]) for values in (adapter.preprocess.mean, adapter.preprocess.std))

    def answer(images: Tensor) -> Array:
        as_float = graph.metadata["input"] == "float"
        pixels = normalize(images, mean, std) if as_float else images.permute(0, 2, 3, 1)
        inputs = {"images": pixels.numpy()}
        return graph.probabilities(inputs) if output is None else graph.run(inputs, output)

    return answer


def _mixed_answer(graph: Graph, bank: Mapping[str, Array], row: int, classes: int) -> Answer:
    """Answer for task ``row`` while every image is followed by the same one for the next task of the bank."""
    neighbour = (row + 1) % len(bank["counts"])

    def answer(images: Tensor) -> Array:
        pixels = images.permute(0, 2, 3, 1).numpy().repeat(2, axis=0)
        index = np.tile(np.array([row, neighbour]), len(images))
        return graph.probabilities({"images": pixels, "index": index, **bank})[::2, :classes]

    return answer


def _check_shared(adapter: Adapter, backbone: Backbone, pool: str) -> None:
    """Raise `ExportError` unless the adapter has what all tasks of a graph must have in common."""
    own, shared = adapter.preprocess, backbone.spec.preprocess
    if (own.mean, own.std) != (shared.mean, shared.std):
        raise ExportError(f"{adapter.task!r} is normalised with other values than its backbone: export it alone")
    if adapter.kind != "classification":
        raise ExportError(f"a graph for many tasks has no place for the masks of {adapter.task!r}: leave it out")
    if adapter.first_block:
        raise ExportError(
            f"the prompts of {adapter.task!r} enter block {adapter.first_block}, not the first: export it alone"
        )
    if adapter.taps or adapter.shift is not None:
        raise ExportError(
            f"a graph for many tasks has no place for the taps or shifts of {adapter.task!r}: export it alone"
        )
    if adapter.threshold is not None:
        raise ExportError(f"images of {adapter.task!r} have several labels, those of other tasks one: export it alone")
    if adapter.pool != pool:
        raise ExportError(f"{adapter.task!r} pools by {adapter.pool}, the graph by {pool}: export it alone")


def _write_bank_file(folder: Path, stored: StoredAdapter) -> None:
    """Put a copy of the adapter's file into the bank, in place at once."""
    with replacing(folder / f"{stored.adapter.task}.safetensors") as path:
        path.write_bytes(stored.data)


def _worst(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    total = Tally(
        max_abs_difference=max(tally.max_abs_difference for tally in tallies.values()),
        images=sum(tally.images for tally in tallies.values()),
        agreed=sum(tally.agreed for tally in tallies.values()),
    )
    return total.to_dict()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
