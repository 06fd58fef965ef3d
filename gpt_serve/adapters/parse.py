"""What an adapter file holds, read as hostile input: safetensors with metadata. Needs numpy alone.

Exported graphs are served without this package: ``export/adapter_file.py`` is a copy of this file, which a test holds
equal. Whether the content makes sense as an adapter is for whoever asks: ``file.py`` here, ``bank.py`` there.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_FILE_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_PROMPTS = 4096
MAX_LABEL_LENGTH = 256
MAX_KNOTS = 1000

FORMATS = ("gpt-serve/1", "gpt-serve/2")  # the first has neither shifts, taps nor masks
REQUIRED = ("head.weight", "head.bias")
DECODER = {"head.norm.weight": 1, "head.norm.bias": 1}
DECODER |= {f"head.conv{number}.{part}": size for number in range(1, 5) for part, size in (("weight", 4), ("bias", 1))}
"""Tensors of a SETR-PUP decoder, in the order in which they are used, and how many dimensions they have."""
UNKNOWN = {"unknown.mean": 1, "unknown.scale": 1, "unknown.basis": 2, "unknown.knots": 1}
"""Tensors that tell strangers, likewise: all of them or none."""
_DIMENSIONS = {"prompt": 3, "gamma": 1, "tau": 1, "shift": 3, "head.weight": 2, "head.bias": 1, **DECODER, **UNKNOWN}
_DIMENSIONS["threshold"] = 1  # of a task with several labels an image
_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_METADATA = {"format", "task", "method", "backbone", "backbone_sha256"}
_METADATA |= {"labels", "pool", "preprocess", "training", "created"}
_OPTIONAL = {"first_block", "taps", "kind", "ignore", "multi_label"}
_CROP_MODES = ("center", "squash", "pad", "windows")
_PREPROCESS = ["input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "exif"]


class ParseError(ValueError):
    """The first thing that is wrong with a file; the message is one line."""


@dataclass(frozen=True)
class Parsed:
    """A file whose header is in order.

    Attributes:
        metadata: strings by name; all that must be there, and nothing that is unknown.
        shapes: of each tensor, by its name in the file; no other names than an adapter's.
    """

    metadata: dict[str, str]
    shapes: dict[str, list[int]]
    _dtypes: dict[str, str]
    _bytes: dict[str, bytes]

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Convert the tensors to float32.

        Raises:
            ParseError: a value is not finite (``gamma`` may be infinite), a temperature not positive.
        """
        tensors = {}
        for name, shape in self.shapes.items():
            values = _to_float32(self._bytes[name], self._dtypes[name])
            bad = np.isnan(values) if name == "gamma" else ~np.isfinite(values)
            if bad.any():
                raise ParseError(f"tensor {name!r} holds values that are not finite")
            tensors[name] = values.reshape(shape)
        if "tau" in tensors and (tensors["tau"] <= 0).any():
            raise ParseError("tensor 'tau' must be positive")
        if "threshold" in tensors and ((tensors["threshold"] < 0) | (tensors["threshold"] > 1)).any():
            raise ParseError("tensor 'threshold' must lie between 0 and 1")
        if "unknown.knots" in tensors and (np.diff(tensors["unknown.knots"]) < 0).any():
            raise ParseError("tensor 'unknown.knots' must ascend")
        return tensors


def parse(data: bytes) -> Parsed:
    """Check all of a file but the values of its tensors and the meaning of its metadata.

    Raises:
        ParseError: the first thing that is wrong with it.
    """
    header, start = _read_header(data)
    metadata = _read_metadata(header.pop("__metadata__", None))
    shapes = {name: _read_shape(name, entry, len(data) - start) for name, entry in header.items()}
    for name in (*REQUIRED, *(UNKNOWN if UNKNOWN.keys() & shapes.keys() else ())):
        if name not in shapes:
            raise ParseError(f"tensor {name!r} is missing")
    _check_unknown(shapes)
    end, body = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            raise ParseError(f"not a valid safetensors file: tensor {name!r} does not lie where the one before it ends")
        body[name], end = data[start + first : start + last], last
    if start + end != len(data):
        raise ParseError("not a valid safetensors file: it has bytes that belong to no tensor")
    return Parsed(metadata, shapes, {name: entry["dtype"] for name, entry in header.items()}, body)


def parse_json(text: str, what: str) -> Any:
    """Parse JSON without duplicate keys, numbers that are not finite, or strings that UTF-8 cannot hold."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ParseError(f"{what} holds the key {short(key)} twice")
            result[key] = value
        return result

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ParseError(f"{what} holds the number {number[:20]}, which is not finite")
        return float(number)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        json.dumps(value, ensure_ascii=False).encode()  # escapes can hide half a surrogate pair
    except ParseError:
        raise
    except UnicodeEncodeError as error:
        raise ParseError(f"{what} holds text that is not valid Unicode") from error
    except (ValueError, RecursionError) as error:
        raise ParseError(f"{what} is not valid JSON") from error
    return value


def parse_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object as `parse_json` does."""
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise ParseError(f"{what} is not a JSON object")
    return value


def parse_labels(text: str) -> list[str]:
    """Parse the names of two or more classes, all different."""
    labels = parse_json(text, "labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ParseError("labels is not a list of strings")
    if len(labels) < 2:
        raise ParseError(f"labels must name at least two classes, not {len(labels)}")
    if len(set(labels)) != len(labels):
        raise ParseError("labels must all be different")
    if any(not 1 <= len(label) <= MAX_LABEL_LENGTH for label in labels):
        raise ParseError(f"labels must have 1 to {MAX_LABEL_LENGTH} characters")
    return labels


def parse_preprocess(text: str) -> dict[str, Any]:
    """Parse the fields of a ``Preprocess``, see ``gpt_serve/specs.py``: sizes as integers, other numbers as floats."""
    value = parse_object(text, "preprocess")
    if unknown := sorted(set(value) ^ set(_PREPROCESS)):
        keys = ", ".join(key if key.isprintable() else repr(key) for key in unknown)
        raise ParseError(f"preprocess: unexpected or missing preprocess keys: {keys[:80]}")
    size = _numbers(value["input_size"], 2, "input_size")
    if any(side != int(side) or not 1 <= side <= 4096 for side in size):
        raise ParseError("preprocess: input_size must be two integers between 1 and 4096")
    (crop_pct,) = _numbers([value["crop_pct"]], 1, "crop_pct")
    if not 0.05 <= crop_pct <= 1:
        raise ParseError("preprocess: crop_pct must lie between 0.05 and 1")
    for key, known in (("crop_mode", _CROP_MODES), ("interpolation", ("bilinear", "bicubic"))):
        if value[key] not in known:
            raise ParseError(f"preprocess: {key} must be {' or '.join(known)}")
    if not isinstance(value["exif"], bool):
        raise ParseError("preprocess: exif must be true or false")
    mean, std = (_numbers(value[key], 3, key) for key in ("mean", "std"))
    if any(not 1e-3 <= item <= 1e3 for item in std):
        raise ParseError("preprocess: std must lie between 0.001 and 1000")
    sides = (int(size[0]), int(size[1]))
    return value | {"input_size": sides, "crop_pct": crop_pct, "mean": tuple(mean), "std": tuple(std)}


def are_sizes(value: Any, count: int, smallest: int) -> bool:
    """Tell whether a JSON value is a list of ``count`` integers from ``smallest`` on that can be sizes."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(size, int) and not isinstance(size, bool) and smallest <= size < 2**31 for size in value)
    )


def short(value: object) -> str:
    """Cut a hostile value down to what fits into a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the header, and where the tensors start."""
    if len(data) > MAX_FILE_BYTES:
        raise ParseError(f"the file has {len(data)} bytes, more than the {MAX_FILE_BYTES} allowed")
    if len(data) < 8:
        raise ParseError(f"the file is truncated: {len(data)} bytes")
    start = 8 + int.from_bytes(data[:8], "little")
    if start - 8 > MAX_HEADER_BYTES:
        raise ParseError(
            # Not how many it claims: of any other file, as behind a link to one, these are its first bytes.
            f"not a safetensors file, or a hostile one: it claims a header of more than the {MAX_HEADER_BYTES} bytes "
            "allowed"
        )
    if start > len(data):
        raise ParseError("the file is truncated within its header")
    try:
        text = data[8:start].decode()
    except UnicodeDecodeError as error:
        raise ParseError("the header is not UTF-8") from error
    return parse_object(text, "the header"), start


def _read_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise ParseError("the header holds no metadata")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ParseError("the metadata holds values that are not strings")
    wrong = sorted((set(metadata) - _OPTIONAL) ^ _METADATA)
    if wrong:
        state = "missing" if wrong[0] in _METADATA else "unknown"
        raise ParseError(f"metadata key {short(wrong[0])} is {state}")
    if metadata["format"] not in FORMATS:
        raise ParseError(f"format {short(metadata['format'])} is not {' or '.join(map(repr, FORMATS))}")
    return metadata


def _read_shape(name: str, entry: Any, available: int) -> list[int]:
    """Return the shape of a tensor whose header entry fits the format and the ``available`` bytes after the header."""
    if name not in _DIMENSIONS:
        raise ParseError(f"unknown tensor {short(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ParseError(f"tensor {name!r} must have a dtype, a shape, data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ParseError(f"tensor {name!r} has dtype {short(dtype)}, not one of {', '.join(_DTYPES)}")
    smallest = 0 if name == "gamma" else 1  # a single block has no gate
    if not are_sizes(shape, _DIMENSIONS[name], smallest):
        raise ParseError(f"tensor {name!r} has shape {short(shape)}, not {_DIMENSIONS[name]} positive dimension(s)")
    size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if not are_sizes(offsets, 2, 0) or offsets[1] - offsets[0] != size:
        raise ParseError(f"tensor {name!r} has data_offsets {short(offsets)}, which do not fit its shape")
    if offsets[1] > available:
        raise ParseError(f"the file is truncated within tensor {name!r}")
    return list(shape)


def _check_unknown(shapes: dict[str, list[int]]) -> None:
    """Raise `ParseError` unless what tells strangers fits the features that the head reads."""
    columns = shapes["head.weight"][1]
    for name in ("unknown.mean", "unknown.scale", "unknown.basis"):
        if name in shapes and shapes[name][-1] != columns:
            raise ParseError(f"tensor {name!r} has width {shapes[name][-1]}, tensor 'head.weight' {columns}")
    if "unknown.knots" in shapes and shapes["unknown.knots"][0] > MAX_KNOTS:
        raise ParseError(f"tensor 'unknown.knots' holds more than the {MAX_KNOTS} distances allowed")


def _to_float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    values = np.frombuffer(data, _DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a float64 may become infinite, which is refused
        return values.astype(np.float32)


def _numbers(value: Any, count: int, name: str) -> list[float]:
    """Return ``count`` finite numbers of ordinary size, as floats."""
    if not isinstance(value, list) or len(value) != count:
        raise ParseError(f"preprocess: {name} must hold {count} number(s)")
    if any(isinstance(item, bool) or not isinstance(item, int | float) or not abs(item) <= 1e6 for item in value):
        raise ParseError(f"preprocess: {name} must hold finite numbers")
    return [float(item) for item in value]
