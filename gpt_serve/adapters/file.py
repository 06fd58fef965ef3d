"""The adapter file: safetensors with metadata; reading is hostile-input parsing."""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, get_args

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from gpt_serve.adapters.parse import (
    DECODER,
    FORMATS,
    MAX_HEADER_BYTES,
    MAX_PROMPTS,
    REQUIRED,
    UNKNOWN,
    ParseError,
    are_sizes,
    parse,
    parse_json,
    parse_labels,
    parse_object,
    parse_preprocess,
    short,
)
from gpt_serve.errors import InvalidAdapter, InvalidTaskName
from gpt_serve.specs import OF_PATCHES, POOLED, Kind, Pool, Preprocess, Tap, check_task_name

FORMAT = FORMATS[-1]
MAX_TAPS = 64
MAX_MASK_CLASSES = 255  # a mask has a byte for each pixel, and 255 is what label files call no class
MAX_CHANNELS = 1024  # of a decoder

_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", re.ASCII)
PLAIN = ("task", "method", "backbone", "backbone_sha256", "pool", "created")  # the others hold JSON


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
    try:
        parsed = parse(data)
        fields = _read_metadata(parsed.metadata)
        _check_kind(fields, parsed.shapes)
        _check_multi_label(parsed.metadata.get("multi_label"), fields["kind"], parsed.shapes)
        _check_shapes(parsed.shapes, len(fields["labels"]), fields["first_block"], max(1, len(fields["taps"])))
        return fields, {name: torch.from_numpy(array) for name, array in parsed.tensors().items()}
    except ParseError as error:
        raise InvalidAdapter(str(error)) from error


def _read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    preprocess = Preprocess(**parse_preprocess(metadata["preprocess"]))
    _check_text(metadata)
    return {name: metadata[name] for name in PLAIN} | {
        "labels": tuple(parse_labels(metadata["labels"])),
        "preprocess": preprocess,
        "training": parse_object(metadata["training"], "training"),
        "first_block": _parse_first_block(metadata.get("first_block")),
        "taps": _parse_taps(metadata.get("taps")),
        "kind": _parse_kind(metadata.get("kind")),
        "ignore": _parse_ignore(metadata.get("ignore")),
    }


def _check_text(metadata: Mapping[str, str]) -> None:
    try:
        check_task_name(metadata["task"])
    except InvalidTaskName as error:
        raise InvalidAdapter(str(error)) from error
    if not re.fullmatch(r"[a-z0-9+-]{1,32}", metadata["method"]):
        raise InvalidAdapter(f"method {short(metadata['method'])} is not 1 to 32 of a-z 0-9 + -")
    if not metadata["backbone"].isprintable() or not 1 <= len(metadata["backbone"]) <= 200:
        raise InvalidAdapter("backbone is not 1 to 200 printable characters")
    if not re.fullmatch(r"[0-9a-f]{64}", metadata["backbone_sha256"]):
        raise InvalidAdapter("backbone_sha256 is not 64 hex digits")
    if metadata["pool"] not in get_args(Pool):
        raise InvalidAdapter(f"pool {short(metadata['pool'])} is not one of {', '.join(get_args(Pool))}")
    try:
        datetime.fromisoformat(metadata["created"])
        is_time = _CREATED.fullmatch(metadata["created"]) is not None
    except ValueError:
        is_time = False
    if not is_time:
        raise InvalidAdapter(f"created {short(metadata['created'])} is not a UTC time like 2026-01-31T12:00:00Z")


def _parse_first_block(text: str | None) -> int:
    if text is None:
        return 0
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text, re.ASCII):
        raise InvalidAdapter(f"first_block {short(text)} is not a whole number from 1 to 9999")
    return int(text)


def _parse_taps(text: str | None) -> tuple[Tap, ...]:
    if text is None:
        return ()
    pairs = parse_json(text, "taps")
    if not isinstance(pairs, list) or not 1 <= len(pairs) <= MAX_TAPS or not all(map(_is_tap, pairs)):
        raise InvalidAdapter(f"taps {short(text)} is not a list of 1 to {MAX_TAPS} pairs [block, pooling]")
    taps = tuple(Tap(block, pool) for block, pool in pairs)
    if len(set(taps)) != len(taps):
        raise InvalidAdapter("taps must all be different")
    return taps


def _parse_kind(text: str | None) -> Kind:
    if text not in (None, *get_args(Kind)):
        raise InvalidAdapter(f"kind {short(text)} is not {' or '.join(get_args(Kind))}")
    return "segmentation" if text == "segmentation" else "classification"


def _parse_ignore(text: str | None) -> tuple[int, ...]:
    values = [] if text is None else parse_json(text, "ignore")
    if not isinstance(values, list) or not are_sizes(values, len(values), 0) or max(values, default=0) > 255:
        raise InvalidAdapter(f"ignore {short(text)} is not a list of whole numbers from 0 to 255")
    return tuple(values)


def _is_tap(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and are_sizes(pair[:1], 1, 0)
        and len(pair) == 2
        and isinstance(pair[1], str)
        and pair[1] in POOLED + OF_PATCHES
    )


def _check_kind(fields: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Raise `InvalidAdapter` unless head, taps and geometry are such as the kind has."""
    kind, mode, taps = fields["kind"], fields["preprocess"].crop_mode, fields["taps"]
    decoder = [name for name in DECODER if name in shapes]
    if kind == "classification":
        if decoder or fields["ignore"] or any(tap.pool in OF_PATCHES for tap in taps):
            raise InvalidAdapter("its head reads every patch, as only one of kind 'segmentation' may")
        if mode not in ("center", "squash"):
            raise InvalidAdapter(f"crop_mode {mode!r} is for kind 'segmentation' alone")
        return
    if UNKNOWN.keys() & shapes.keys():
        raise InvalidAdapter("tensors 'unknown.*' are for kind 'classification' alone")
    if mode == "center":
        raise InvalidAdapter("crop_mode 'center' would lose the borders of a mask: use squash, pad or windows")
    if len(fields["labels"]) > MAX_MASK_CLASSES:
        raise InvalidAdapter(f"labels names {len(fields['labels'])} classes, a mask has {MAX_MASK_CLASSES} at most")
    pools = {tap.pool for tap in taps}
    if pools != ({"raw"} if decoder else {"grid"}) or (decoder and len(taps) != 1):
        wanted = "one tap of pooling 'raw', for its decoder" if decoder else "one or more taps of pooling 'grid'"
        raise InvalidAdapter(f"its head must read {wanted}")
    if decoder:
        _check_decoder(shapes)


def _check_multi_label(text: str | None, kind: Kind, shapes: Mapping[str, list[int]]) -> None:
    """Raise `InvalidAdapter` unless thresholds are there where there are several labels an image, and only there."""
    if text not in (None, "true"):
        raise InvalidAdapter(f"multi_label {short(text)} is not 'true'")
    if (text is not None) != ("threshold" in shapes):
        raise InvalidAdapter(
            "a task with several labels has both multi_label and tensor 'threshold', no other has either"
        )
    if text is not None and kind != "classification":
        raise InvalidAdapter("multi_label is for kind 'classification' alone")


def _check_decoder(shapes: Mapping[str, list[int]]) -> None:
    """Raise `InvalidAdapter` unless the decoder's tensors fit each other, and the head them; see `model.heads`."""
    if missing := [name for name in DECODER if name not in shapes]:
        raise InvalidAdapter(f"tensor {missing[0]!r} of the decoder is missing")
    width, channels = shapes["head.norm.weight"][0], shapes["head.weight"][1]
    if channels > MAX_CHANNELS:
        raise InvalidAdapter(f"its decoder has {channels} channels, more than the {MAX_CHANNELS} allowed")
    expected = {"head.norm.weight": [width], "head.norm.bias": [width]}
    for number in range(1, 5):
        expected[f"head.conv{number}.weight"] = [channels, width if number == 1 else channels, 3, 3]
        expected[f"head.conv{number}.bias"] = [channels]
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InvalidAdapter(f"tensor {name!r} has shape {shapes[name]}, not {shape}")


def _check_shapes(shapes: Mapping[str, list[int]], classes: int, first_block: int, taps: int) -> None:
    for name in REQUIRED:
        if shapes[name][0] != classes:
            raise InvalidAdapter(f"tensor {name!r} is for {shapes[name][0]} classes, labels names {classes}")
    width, rest = divmod(shapes["head.weight"][1], taps)
    width = shapes.get("head.norm.weight", [width])[0]
    if rest:
        raise InvalidAdapter(
            f"tensor 'head.weight' has {shapes['head.weight'][1]} columns for {taps} taps of equal width"
        )
    if "threshold" in shapes and shapes["threshold"] != [classes]:
        raise InvalidAdapter(f"tensor 'threshold' is for {shapes['threshold'][0]} classes, labels names {classes}")
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
