"""The adapters of a multi-task graph, read from its bank folder as hostile input: numpy only.

A bank file is a safetensors file, byte for byte the adapter that `gpt-serve train` wrote. Shapes: tasks T, blocks L,
prompts P, width D, classes C.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("gpt-serve/1", "gpt-serve/2")
MAX_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_PROMPTS = 4096
DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
DIMENSIONS = {"prompt": 3, "gamma": 1, "tau": 1, "head.weight": 2, "head.bias": 1}
METADATA = {"format", "task", "method", "backbone", "backbone_sha256"}
METADATA |= {"labels", "pool", "preprocess", "training", "created"}
PREPROCESS = {"input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "exif"}

Metadata = Mapping[str, str]
Tensors = dict[str, np.ndarray]


class BankError(ValueError):
    """An adapter that cannot be used; the message is one line."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise BankError(message)


def read_bank(
    folder: Path, tasks: Sequence[str], graph: Metadata, shapes: Mapping[str, Sequence[Any]]
) -> tuple[list[tuple[Metadata, str]], Tensors]:
    """Read adapters and stack them.

    Args:
        folder: of the files ``<task>.safetensors``.
        tasks: which ones; all if empty.
        graph: the metadata of the graph.
        shapes: of the graph's inputs.

    Returns:
        (metadata, revision) of each task in sorted order, and the graph's inputs by name, see `stack`.

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
            require(file.is_file() and file.stat().st_size <= MAX_BYTES, f"not a file of at most {MAX_BYTES} bytes")
            data = file.read_bytes()
            metadata, tensors = parse_adapter(data)
            check_metadata(metadata, task, graph)
            check_tensors(tensors, len(parse_json(metadata["labels"], "labels")), layers, depth, width)
        except OSError as error:
            raise BankError(f"{file} cannot be read: {error.strerror}") from error
        except BankError as error:
            raise BankError(f"{file} is refused: {error}; add the task again with gpt-serve export") from error
        held.append((metadata, hashlib.sha256(data).hexdigest()[:12]))
        rows.append(tensors)
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


def parse_adapter(data: bytes) -> tuple[Metadata, Tensors]:
    """An adapter file's metadata and its tensors as float32."""
    size = int.from_bytes(data[:8], "little")
    require(len(data) >= 8, "it is truncated")
    require(size <= MAX_HEADER_BYTES, f"not a safetensors file: a header of {size} bytes")
    require(8 + size <= len(data), "it is truncated within its header")
    header, body = parse_json(data[8 : 8 + size], "the header"), data[8 + size :]
    require(isinstance(header, dict), "the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    require(isinstance(metadata, dict) and set(metadata) == METADATA, "its metadata has other keys than an adapter's")
    require(all(isinstance(value, str) for value in metadata.values()), "its metadata holds more than strings")
    require({"head.weight", "head.bias"} <= set(header) <= set(DIMENSIONS), "it has other tensors than an adapter")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: place(*item)):
        shape, dtype = entry["shape"], entry["dtype"]
        require(isinstance(dtype, str) and dtype in DTYPES, f"tensor {name} has a dtype other than {', '.join(DTYPES)}")
        require(are_sizes(shape, DIMENSIONS[name]), f"tensor {name} has no valid shape")
        start, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        require(
            entry["data_offsets"] == [start, end] and end <= len(body), f"tensor {name} does not lie where it should"
        )
        tensors[name] = to_float32(np.frombuffer(body[start:end], DTYPES[dtype]), dtype).reshape(shape)
    require(end == len(body), "it has bytes that belong to no tensor")
    return metadata, tensors


def place(name: str, entry: Any) -> list[int]:
    """Where a tensor's header entry says that it lies: its first byte and the one after its last."""
    fits = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    require(fits and are_sizes(entry["data_offsets"], 2), f"tensor {name} has no valid header entry")
    offsets: list[int] = entry["data_offsets"]
    return offsets


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a float64 may become infinite, which is refused later
        return values.astype(np.float32)


def check_metadata(metadata: Metadata, task: str, graph: Metadata) -> None:
    """An adapter belongs to its task and to the graph."""
    require(metadata["format"] in FORMATS, f"its format is not {' or '.join(FORMATS)}")
    require(metadata["task"] == task, f"it belongs to task {metadata['task']!r:.80}")
    trained, wanted = (f"{of['backbone']!r:.60} ({of['backbone_sha256'][:12]})" for of in (metadata, graph))
    same = metadata["backbone_sha256"] == graph["backbone_sha256"]
    require(same, f"it was trained on backbone {trained}, the graph holds {wanted}")
    require(metadata["pool"] == graph["pool"], "it pools in another way than the graph")
    labels = parse_json(metadata["labels"], "labels")
    named = isinstance(labels, list) and all(isinstance(label, str) and 1 <= len(label) <= 256 for label in labels)
    require(named and len(set(labels)) == len(labels) >= 2, "labels are not different names of two or more classes")
    check_preprocess(parse_json(metadata["preprocess"], "preprocess"), json.loads(graph["preprocess"]))


def check_preprocess(own: Any, graph: Mapping[str, Any]) -> None:
    require(isinstance(own, dict) and set(own) == PREPROCESS, "preprocess has other keys than it should")
    for key in ("input_size", "mean", "std"):
        require(own[key] == graph[key], f"{key} is not the graph's: {graph[key]}")
    fits = type(own["crop_pct"]) in (int, float) and 0.05 <= own["crop_pct"] <= 1 and isinstance(own["exif"], bool)
    fits = fits and own["crop_mode"] in ("center", "squash") and own["interpolation"] in ("bilinear", "bicubic")
    require(fits, "preprocess has a value that is out of range")


def check_tensors(tensors: Tensors, classes: int, layers: int, depth: int, width: int) -> None:
    """Shapes are the graph's, values finite (gamma may be infinite), temperatures positive."""
    expected = {"gamma": (depth - 1,), "tau": (depth,), "head.weight": (classes, width), "head.bias": (classes,)}
    for name, tensor in tensors.items():
        if name == "prompt":
            given, prompts, own_width = tensor.shape
            require(given in (1, depth) and own_width == width, f"prompt has shape {tensor.shape}, not the graph's")
            require(given in (1, layers), "it has prompts for every block, the graph takes one layer: export it anew")
            require(1 <= prompts <= MAX_PROMPTS, f"{prompts} prompts are not 1 to {MAX_PROMPTS}")
        else:
            require(tensor.shape == expected[name], f"{name} has shape {tensor.shape}, not {expected[name]}")
        valid = ~np.isnan(tensor) if name == "gamma" else np.isfinite(tensor)
        require(valid.all(), f"{name} holds values that are not finite")
    require((tensors.get("tau", np.ones(1)) > 0).all(), "tau is not positive")


def are_sizes(value: Any, count: int) -> bool:
    """Whether a JSON value is a list of ``count`` integers that can be sizes."""
    return isinstance(value, list) and len(value) == count and all(type(x) is int and 0 <= x < 2**31 for x in value)


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON in valid Unicode without duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len({key for key, _ in pairs}) == len(pairs), f"{what} holds a key twice")
        return dict(pairs)

    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=unique)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # escapes can hide half a surrogate pair, which cannot be printed
    except BankError:
        raise
    except (ValueError, RecursionError) as error:
        raise BankError(f"{what} is not valid JSON") from error
    return value
