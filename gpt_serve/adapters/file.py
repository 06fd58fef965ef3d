"""The adapter file: safetensors with metadata; reading is hostile-input parsing."""

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gpt_serve.errors import InvalidAdapter, InvalidTaskName
from gpt_serve.specs import POOLED, Preprocess, Tap, check_task_name

FORMAT = "gpt-serve/2"
READABLE = ("gpt-serve/1", FORMAT)  # the first has neither shifts nor taps
MAX_FILE_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_PROMPTS = 4096
MAX_LABEL_LENGTH = 256
MAX_TAPS = 64

_DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # bytes per element
_TENSORS = {"prompt": 3, "gamma": 1, "tau": 1, "shift": 3, "head.weight": 2, "head.bias": 1}  # dimensions
_REQUIRED = ("head.weight", "head.bias")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", re.ASCII)
PLAIN = ("task", "method", "backbone", "backbone_sha256", "pool", "created")  # the others hold JSON
_METADATA = {*PLAIN, "format", "labels", "preprocess", "training"}
_OPTIONAL = {"first_block", "taps"}


def to_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata in this order; the library itself would write it in random order.

    Raises:
        InvalidAdapter: the metadata is longer than a header may be.
    """
    data = save_tensors(dict(tensors))
    start = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": metadata} | json.loads(data[8:start])
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)  # the format aligns the tensors
    if len(text) > MAX_HEADER_BYTES:
        longest, value = max(metadata.items(), key=lambda item: len(item[1]))
        raise InvalidAdapter(
            f"its header would have {len(text) / 2**20:.2f} MiB, {len(value.encode()) / 2**20:.2f} of them {longest}, "
            f"more than the {MAX_HEADER_BYTES / 2**20:.0f} allowed"
        )
    return len(text).to_bytes(8, "little") + text + data[start:]


def from_file(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of an `Adapter` from the metadata, and float32 tensors by their names in the file.

    Raises:
        InvalidAdapter: the first thing that is wrong with it.
    """
    header, start = _read_header(data)
    fields = _read_metadata(header.pop("__metadata__", None))
    shapes = {name: _read_shape(name, entry, len(data) - start) for name, entry in header.items()}
    _check_shapes(shapes, len(fields["labels"]), fields["first_block"], max(1, len(fields["taps"])))
    try:
        tensors = {name: tensor.float() for name, tensor in load_tensors(data).items()}
    except (SafetensorError, RuntimeError, ValueError, OverflowError) as error:
        raise InvalidAdapter(f"not a valid safetensors file: {_one_line(error)}") from error
    _check_values(tensors)
    return fields, tensors


def _short(value: object) -> str:
    """A hostile value, fit for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(error)[:160])


def _parse_json(text: str, what: str) -> Any:
    """JSON without duplicate keys, numbers that are not finite, or strings that UTF-8 cannot hold."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise InvalidAdapter(f"{what} holds the key {_short(key)} twice")
            result[key] = value
        return result

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise InvalidAdapter(f"{what} holds the number {number[:20]}, which is not finite")
        return float(number)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        json.dumps(value, ensure_ascii=False).encode()  # escapes can hide half a surrogate pair
    except UnicodeEncodeError as error:
        raise InvalidAdapter(f"{what} holds text that is not valid Unicode") from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{what} is not valid JSON") from error
    return value


def _parse_object(text: str, what: str) -> dict[str, Any]:
    value = _parse_json(text, what)
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{what} is not a JSON object")
    return value


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors start."""
    if len(data) > MAX_FILE_BYTES:
        raise InvalidAdapter(f"the file has {len(data)} bytes, more than the {MAX_FILE_BYTES} allowed")
    if len(data) < 8:
        raise InvalidAdapter(f"the file is truncated: {len(data)} bytes")
    start = 8 + int.from_bytes(data[:8], "little")
    if start - 8 > MAX_HEADER_BYTES:
        raise InvalidAdapter(
            f"not a safetensors file, or a hostile one: it claims a header of {start - 8} bytes, "
            f"more than the {MAX_HEADER_BYTES} allowed"
        )
    if start > len(data):
        raise InvalidAdapter("the file is truncated within its header")
    try:
        text = data[8:start].decode()
    except UnicodeDecodeError as error:
        raise InvalidAdapter("the header is not UTF-8") from error
    return _parse_object(text, "the header"), start


def _read_shape(name: str, entry: Any, available: int) -> list[int]:
    """The shape of a tensor whose header entry fits the format and the ``available`` bytes after the header."""
    if name not in _TENSORS:
        raise InvalidAdapter(f"unknown tensor {_short(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidAdapter(f"tensor {name!r} must have a dtype, a shape, data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InvalidAdapter(f"tensor {name!r} has dtype {_short(dtype)}, not one of {', '.join(_DTYPES)}")
    smallest = 0 if name == "gamma" else 1  # a single block has no gate
    if not _are_sizes(shape, _TENSORS[name], smallest):
        raise InvalidAdapter(f"tensor {name!r} has shape {_short(shape)}, not {_TENSORS[name]} positive dimension(s)")
    if not _are_sizes(offsets, 2, 0) or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype]:
        raise InvalidAdapter(f"tensor {name!r} has data_offsets {_short(offsets)}, which do not fit its shape")
    if offsets[1] > available:
        raise InvalidAdapter(f"the file is truncated within tensor {name!r}")
    return list(shape)


def _are_sizes(value: Any, count: int, smallest: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(size, int) and not isinstance(size, bool) and smallest <= size < 2**31 for size in value)
    )


def _read_metadata(metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, dict):
        raise InvalidAdapter("the header holds no metadata")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidAdapter("the metadata holds values that are not strings")
    wrong = sorted((set(metadata) - _OPTIONAL) ^ _METADATA)
    if wrong:
        state = "missing" if wrong[0] in _METADATA else "unknown"
        raise InvalidAdapter(f"metadata key {_short(wrong[0])} is {state}")
    if metadata["format"] not in READABLE:
        raise InvalidAdapter(f"format {_short(metadata['format'])} is not {' or '.join(map(repr, READABLE))}")
    try:
        preprocess = Preprocess.from_dict(_parse_object(metadata["preprocess"], "preprocess"))
    except ValueError as error:
        raise InvalidAdapter(f"preprocess: {_one_line(error)}") from error
    _check_text(metadata)
    return {name: metadata[name] for name in PLAIN} | {
        "labels": _parse_labels(metadata["labels"]),
        "preprocess": preprocess,
        "training": _parse_object(metadata["training"], "training"),
        "first_block": _parse_first_block(metadata.get("first_block")),
        "taps": _parse_taps(metadata.get("taps")),
    }


def _check_text(metadata: Mapping[str, str]) -> None:
    try:
        check_task_name(metadata["task"])
    except InvalidTaskName as error:
        raise InvalidAdapter(str(error)) from error
    if not re.fullmatch(r"[a-z0-9-]{1,32}", metadata["method"]):
        raise InvalidAdapter(f"method {_short(metadata['method'])} is not 1 to 32 of a-z 0-9 -")
    if not metadata["backbone"].isprintable() or not 1 <= len(metadata["backbone"]) <= 200:
        raise InvalidAdapter("backbone is not 1 to 200 printable characters")
    if not re.fullmatch(r"[0-9a-f]{64}", metadata["backbone_sha256"]):
        raise InvalidAdapter("backbone_sha256 is not 64 hex digits")
    if metadata["pool"] not in ("cls", "mean"):
        raise InvalidAdapter(f"pool {_short(metadata['pool'])} is not cls or mean")
    try:
        datetime.fromisoformat(metadata["created"])
        is_time = _CREATED.fullmatch(metadata["created"]) is not None
    except ValueError:
        is_time = False
    if not is_time:
        raise InvalidAdapter(f"created {_short(metadata['created'])} is not a UTC time like 2026-01-31T12:00:00Z")


def _parse_labels(text: str) -> tuple[str, ...]:
    labels = _parse_json(text, "labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InvalidAdapter("labels is not a list of strings")
    if len(labels) < 2:
        raise InvalidAdapter(f"labels must name at least two classes, not {len(labels)}")
    if len(set(labels)) != len(labels):
        raise InvalidAdapter("labels must all be different")
    if any(not 1 <= len(label) <= MAX_LABEL_LENGTH for label in labels):
        raise InvalidAdapter(f"labels must have 1 to {MAX_LABEL_LENGTH} characters")
    return tuple(labels)


def _parse_first_block(text: str | None) -> int:
    if text is None:
        return 0
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text, re.ASCII):
        raise InvalidAdapter(f"first_block {_short(text)} is not a whole number from 1 to 9999")
    return int(text)


def _parse_taps(text: str | None) -> tuple[Tap, ...]:
    if text is None:
        return ()
    pairs = _parse_json(text, "taps")
    if not isinstance(pairs, list) or not 1 <= len(pairs) <= MAX_TAPS or not all(map(_is_tap, pairs)):
        raise InvalidAdapter(f"taps {_short(text)} is not a list of 1 to {MAX_TAPS} pairs [block, pooling]")
    taps = tuple(Tap(block, pool) for block, pool in pairs)
    if len(set(taps)) != len(taps):
        raise InvalidAdapter("taps must all be different")
    return taps


def _is_tap(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and _are_sizes(pair[:1], 1, 0)
        and len(pair) == 2
        and isinstance(pair[1], str)
        and pair[1] in POOLED
    )


def _check_shapes(shapes: Mapping[str, list[int]], classes: int, first_block: int, taps: int) -> None:
    for name in _REQUIRED:
        if name not in shapes:
            raise InvalidAdapter(f"tensor {name!r} is missing")
        if shapes[name][0] != classes:
            raise InvalidAdapter(f"tensor {name!r} is for {shapes[name][0]} classes, labels names {classes}")
    width, rest = divmod(shapes["head.weight"][1], taps)
    if rest:
        raise InvalidAdapter(
            f"tensor 'head.weight' has {shapes['head.weight'][1]} columns for {taps} taps of equal width"
        )
    depths = {}
    if first_block and "prompt" not in shapes:
        raise InvalidAdapter("first_block is given, but tensor 'prompt' is missing")
    if "prompt" in shapes:
        layers, prompts, prompt_width = shapes["prompt"]
        if prompt_width != width:
            raise InvalidAdapter(f"tensor 'prompt' has width {prompt_width}, tensor 'head.weight' {width}")
        if prompts > MAX_PROMPTS:
            raise InvalidAdapter(f"tensor 'prompt' has {prompts} prompts, more than the {MAX_PROMPTS} allowed")
        if layers > 1:
            depths["prompt"] = layers + first_block
    if "gamma" in shapes:
        depths["gamma"] = shapes["gamma"][0] + 1 + first_block
    if "tau" in shapes:
        depths["tau"] = shapes["tau"][0]
    if "shift" in shapes:
        depths["shift"], places, shift_width = shapes["shift"]
        if (places, shift_width) != (3, width):
            raise InvalidAdapter(f"tensor 'shift' has shape {shapes['shift']}, not (blocks, 3, {width})")
    if len(set(depths.values())) > 1:
        counts = ", ".join(f"{name} {depth}" for name, depth in depths.items())
        raise InvalidAdapter(f"tensors disagree on the number of blocks: {counts}")


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        bad = torch.isnan(tensor) if name == "gamma" else ~torch.isfinite(tensor)
        if bad.any():
            raise InvalidAdapter(f"tensor {name!r} holds values that are not finite")
    if "tau" in tensors and (tensors["tau"] <= 0).any():
        raise InvalidAdapter("tensor 'tau' must be positive")
