"""The adapters of a multi-task graph, read from its bank folder as hostile input: numpy only.

A bank file is a safetensors file, byte for byte the adapter that `gpt-serve train` wrote. Shapes: tasks T, blocks L,
prompts P, width D, classes C.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from adapter_file import MAX_FILE_BYTES, MAX_PROMPTS, UNKNOWN, ParseError, parse, parse_labels, parse_preprocess

Metadata = Mapping[str, str]
Tensors = dict[str, np.ndarray]


class BankError(ValueError):
    """An adapter that cannot be used; the message is one line."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise BankError(message)


def read_bank(
    folder: Path, tasks: Sequence[str], graph: Metadata, shapes: Mapping[str, Sequence[Any]]
) -> tuple[list[tuple[str, str, list[str], dict[str, Any]]], Tensors]:
    """Read adapters and stack them.

    Args:
        folder: of the files ``<task>.safetensors``.
        tasks: which ones; all if empty.
        graph: the metadata of the graph.
        shapes: of the graph's inputs.

    Returns:
        (task, revision, labels, preprocess) of each task in sorted order, and the graph's inputs by name, see `stack`.

    Raises:
        BankError: no such task, or its file is damaged, hostile or of another backbone.
    """
    there = sorted(file.name.removesuffix(".safetensors") for file in folder.glob("[!.]*.safetensors"))
    require(there, f"no adapters in {folder}: move that folder together with the graph")
    unknown = sorted(set(tasks) - set(there))
    require(not unknown, f"no task {', '.join(unknown)} in {folder}: there are {', '.join(there)}")
    layers, depth, width = shapes["prompt"][1], shapes["tau"][1], shapes["head_weight"][2]
    held, rows = [], []
    for task in sorted(set(tasks) or there):
        file = folder / f"{task}.safetensors"
        try:
            size = file.stat().st_size if file.is_file() else MAX_FILE_BYTES + 1
            require(size <= MAX_FILE_BYTES, f"not a file of at most {MAX_FILE_BYTES} bytes")
            data = file.read_bytes()
            parsed = parse(data)
            labels = parse_labels(parsed.metadata["labels"])
            preprocess = parse_preprocess(parsed.metadata["preprocess"])
            check_metadata(parsed.metadata, preprocess, task, graph)
            check_shapes(parsed.shapes, len(labels), layers, depth, width)
            rows.append(parsed.tensors())
        except OSError as error:
            raise BankError(f"{file} cannot be read: {error.strerror}") from error
        except (BankError, ParseError) as error:
            raise BankError(f"{file} is refused: {error}; add the task again with gpt-serve export") from error
        held.append((task, hashlib.sha256(data).hexdigest()[:12], labels, preprocess))
    return held, {name: array for name, array in stack(rows, layers, depth).items() if name in shapes}


def stack(rows: Sequence[Tensors], layers: int, depth: int) -> Tensors:
    """The inputs of the graph that hold the adapters ``rows``, padded to the longest.

    Returns:
        ``prompt`` (T, layers, P, D), ``counts`` (T,), ``gate`` (T, L-1), ``tau`` (T, L), ``is_deep`` (T,),
        ``head_weight`` (T, C, D) and ``head_bias`` (T, C), padded with -inf: probability 0.
    """
    count = len(rows)
    classes, width = max(len(row["head.bias"]) for row in rows), rows[0]["head.weight"].shape[1]
    prompts = max([1, *(row["prompt"].shape[1] for row in rows if "prompt" in row)])
    bank = {
        "prompt": np.zeros((count, layers, prompts, width), np.float32),
        "counts": np.zeros(count, np.int64),
        "gate": np.ones((count, depth - 1), np.float32),
        "tau": np.ones((count, depth), np.float32),
        "is_deep": np.zeros(count, np.bool_),
        "head_weight": np.zeros((count, classes, width), np.float32),
        "head_bias": np.full((count, classes), -np.inf, np.float32),
    }
    for at, row in enumerate(rows):
        own = len(row["head.bias"])
        bank["head_weight"][at, :own], bank["head_bias"][at, :own] = row["head.weight"], row["head.bias"]
        if "prompt" in row:
            given, length, _ = row["prompt"].shape
            bank["prompt"][at, :given, :length] = row["prompt"]
            bank["counts"][at], bank["is_deep"][at] = length, given > 1
        if "gamma" in row:
            with np.errstate(over="ignore"):  # exp(88) and more is infinite: a gate of 0
                bank["gate"][at] = 1 / (1 + np.exp(-row["gamma"]))
        elif bank["is_deep"][at]:
            bank["gate"][at] = 0
        bank["tau"][at] = row.get("tau", 1)
    return bank


def check_metadata(metadata: Metadata, preprocess: Mapping[str, Any], task: str, graph: Metadata) -> None:
    """Raise `BankError` unless an adapter belongs to its task and to the graph."""
    require(metadata["task"] == task, f"it belongs to task {metadata['task']!r:.80}")
    trained, wanted = (f"{of['backbone']!r:.60} ({of['backbone_sha256'][:12]})" for of in (metadata, graph))
    same = metadata["backbone_sha256"] in (graph["backbone_sha256"], graph.get("resized_sha256"))
    require(same, f"it was trained on backbone {trained}, the graph holds {wanted}")
    require(metadata["pool"] == graph["pool"], "it pools in another way than the graph")
    masks = {"kind", "ignore"} & metadata.keys() or preprocess["crop_mode"] not in ("center", "squash")
    require(not masks, "it answers with masks, or is broken: a graph for many tasks classifies")
    require("multi_label" not in metadata, "its images have several labels, those of other tasks one: export it alone")
    require("taps" not in metadata, "its head reads other blocks than the graph's: export it alone")
    require("first_block" not in metadata, "its prompts enter a later block than the graph's: export it alone")
    shared = json.loads(graph["preprocess"])
    for key in ("input_size", "mean", "std"):
        require(list(preprocess[key]) == shared[key], f"{key} is not the graph's: {shared[key]}")


def check_shapes(shapes: Mapping[str, list[int]], classes: int, layers: int, depth: int, width: int) -> None:
    """Raise `BankError` unless the tensors have the graph's shapes."""
    expected = {"gamma": [depth - 1], "tau": [depth], "head.weight": [classes, width], "head.bias": [classes]}
    for name, shape in shapes.items():
        if name in UNKNOWN:
            continue  # what tells strangers is for graphs of one task: this one answers without
        if name == "prompt":
            given, prompts, own_width = shape
            require(given in (1, depth) and own_width == width, f"prompt has shape {shape}, not the graph's")
            require(given in (1, layers), "it has prompts for every block, the graph takes one layer: export it anew")
            require(prompts <= MAX_PROMPTS, f"{prompts} prompts are more than {MAX_PROMPTS}")
        else:
            require(name in expected, f"it has {name}, for which the graph has no place: export it alone")
            require(shape == expected[name], f"{name} has shape {shape}, not {expected[name]}")
