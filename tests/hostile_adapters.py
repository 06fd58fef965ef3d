"""Adapter files that must be refused, each for a reason of its own.

for case in hostile_adapters(spec):
    case.put(root)
    with pytest.raises(case.error, match=case.message):
        AdapterStore(root, spec).load(case.name)
"""

import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.file import to_file
from gpt_serve.adapters.parse import MAX_FILE_BYTES, MAX_PROMPTS
from gpt_serve.adapters.store import FILE_NAME
from gpt_serve.errors import AdapterError, BackboneMismatch, InvalidAdapter
from gpt_serve.specs import BackboneSpec, Tap
from tests.factories import make_adapter, make_segmenter, make_unknown

Header = dict[str, Any]


@dataclass(frozen=True)
class Hostile:
    """One case.

    Attributes:
        name: of the case and of its task.
        message: regular expression that the error must match.
        content: the file's bytes, or what makes something at the path where the file belongs.
        error: the class of the error.
    """

    name: str
    message: str
    content: bytes | Callable[[Path], None]
    error: type[AdapterError] = InvalidAdapter

    def put(self, root: Path) -> Path:
        """Place the file where a store with that root finds it."""
        path = root / self.name / FILE_NAME
        path.parent.mkdir(parents=True)
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


def hostile_adapters(spec: BackboneSpec) -> list[Hostile]:
    """All cases for a server with the backbone ``spec`` (depth above 1), named in order of their kind."""
    kinds = (_files, _headers, _tensors, _shifts, _values, _metadata, _taps, _masks, _unknown, _thresholds, _foreign)
    return [case for kind in kinds for case in kind(spec)]


def unpack(data: bytes) -> tuple[Header, bytes]:
    """A file's header and the bytes of its tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def pack(header: Header | bytes, body: bytes) -> bytes:
    """The reverse of `unpack`, for any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def with_header(adapter: Adapter, change: Callable[[Header], object]) -> bytes:
    """The adapter's file after ``change`` has edited its header in place."""
    header, body = unpack(adapter.to_bytes())
    change(header)
    return pack(header, body)


def with_metadata(adapter: Adapter, **values: object) -> bytes:
    """The adapter's file with other metadata; None drops a key."""
    header, body = unpack(adapter.to_bytes())
    metadata = header["__metadata__"] | values
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}
    return pack(header, body)


def with_value(adapter: Adapter, name: str, value: float) -> bytes:
    """The adapter's file with another first element of one tensor."""
    header, body = unpack(adapter.to_bytes())
    start = header[name]["data_offsets"][0]
    return pack(header, body[:start] + struct.pack("<f", value) + body[start + 4 :])


def with_tensors(adapter: Adapter, **tensors: torch.Tensor) -> bytes:
    """The adapter's file with other float32 tensors, whether they fit or not (``head_bias`` is ``head.bias``)."""
    header, body = unpack(adapter.to_bytes())
    for key, tensor in tensors.items():
        data = tensor.numpy().astype("<f4").tobytes()
        name = key.replace("_", ".")
        old_start, old_end = header[name]["data_offsets"]
        body = body[:old_start] + data + body[old_end:]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [old_start, old_start + len(data)]}
        for other, entry in header.items():
            if other not in ("__metadata__", name) and entry["data_offsets"][0] >= old_end:
                entry["data_offsets"] = [at + len(data) - (old_end - old_start) for at in entry["data_offsets"]]
    return pack(header, body)


def _sparse(size: int, start: bytes = b"") -> Callable[[Path], None]:
    """A file of ``size`` bytes that takes no room on the disk."""

    def write(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return write


def _files(spec: BackboneSpec) -> Iterator[Hostile]:
    """Not this format, or not a file."""
    good = make_adapter(spec, "truncated-tensors").to_bytes()
    header, _ = unpack(good)
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    saved = io.BytesIO()
    torch.save({"head.weight": torch.zeros(4, 4)}, saved)
    yield Hostile("empty", "truncated: 0 bytes", b"")
    yield Hostile("truncated-length", "truncated: 5 bytes", good[:5])
    yield Hostile("truncated-header", "truncated within its header", good[:200])
    yield Hostile("truncated-tensors", f"truncated within tensor '{last}'", good[:-1])
    yield Hostile(
        "trailing-bytes", "not a valid safetensors file: ", make_adapter(spec, "trailing-bytes").to_bytes() + b"x"
    )
    yield Hostile("header-200-mb", "a header of more than the", _sparse(201 * 2**20, struct.pack("<Q", 200 * 2**20)))
    yield Hostile("too-many-bytes", f"file has {MAX_FILE_BYTES + 1} bytes, more than", _sparse(MAX_FILE_BYTES + 1))
    payload = pickle.dumps(Path("harmless"))  # unpickling would call Path: nothing here ever unpickles
    yield Hostile("pickle", "a header of more than the", payload)
    yield Hostile("torch-save", "a header of more than the", saved.getvalue())
    yield Hostile("folder", "folder.*not a regular file", os.mkdir)
    yield Hostile("fifo", "fifo.*not a regular file", os.mkfifo)
    yield Hostile("device", "device.*not a regular file", lambda path: path.symlink_to("/dev/zero"))
    yield Hostile("symlink-loop", "cannot be read: Too many levels", lambda path: path.symlink_to(path))


def _headers(spec: BackboneSpec) -> Iterator[Hostile]:
    """JSON that is broken or a trap."""

    def raw(name: str, old: str, new: str) -> bytes:
        header, body = unpack(make_adapter(spec, name).to_bytes())
        text = json.dumps(header)
        assert old in text
        return pack(text.replace(old, new, 1).encode("utf-8", "surrogatepass"), body)

    yield Hostile("header-not-utf-8", "not-utf-8.*header is not UTF-8", pack(b'{"caf\xe9": 1}', b""))
    yield Hostile("header-not-json", "the header is not valid JSON", pack(b"{'a': 1}    ", b""))
    yield Hostile("header-utf-16", "header-utf-16.*header is not UTF-8", pack("{}".encode("utf-16"), b""))
    yield Hostile("header-list", "header is not a JSON object", pack(b"[1, 2]", b""))
    yield Hostile("header-nesting", "nesting.*not valid JSON", pack(b'{"a":' * 100_000, b""))
    yield Hostile("header-digits", "digits.*not valid JSON", pack(b'{"tau":' + b"9" * 100_000 + b"}", b""))
    yield Hostile(
        "duplicate-tensor",
        "header holds the key 'head.bias' twice",
        raw("duplicate-tensor", '"head.bias": {', '"head.bias": {"dtype": "F32", "shape": [4]}, "head.bias": {'),
    )
    yield Hostile(
        "duplicate-metadata",
        "header holds the key 'pool' twice",
        raw("duplicate-metadata", '"pool": ', '"pool": "cls", "pool": '),
    )
    yield Hostile(
        "duplicate-shape",
        "header holds the key 'shape' twice",
        raw("duplicate-shape", '"shape": ', '"shape": [1], "shape": '),
    )


def _tensors(spec: BackboneSpec) -> Iterator[Hostile]:
    """Names, dtypes, shapes and offsets."""

    def edited(name: str, message: str, change: Callable[[Header], object]) -> Hostile:
        return Hostile(name, message, with_header(make_adapter(spec, name), change))

    def field(name: str, message: str, key: str, value: object) -> Hostile:
        return edited(name, message, lambda header: header["tau"].update({key: value}))

    def shaped(name: str, message: str, **tensors: torch.Tensor) -> Hostile:
        return Hostile(name, message, with_tensors(make_adapter(spec, name), **tensors))

    depth, width = spec.depth, spec.width
    yield edited("tensor-unknown", "unknown tensor 'tail'", lambda header: header.update(tail=header.pop("tau")))
    yield edited("tensor-missing", "tensor 'head.bias' is missing", lambda header: header.pop("head.bias"))
    yield edited("tensor-is-number", "tensor 'tau' must have a dtype", lambda header: header.update(tau=1))
    yield edited("tensor-extra-key", "tensor 'gamma' must have a dtype", lambda header: header["gamma"].update(x=1))
    yield field("dtype-integer", "dtype 'I32', not one of", "dtype", "I32")
    yield field("dtype-list", r"dtype \['F32'\], not one of", "dtype", ["F32"])
    yield field("shape-negative", rf"shape \[-{depth}\], not 1 positive", "shape", [-depth])
    yield field("shape-boolean", r"shape \[True\], not 1 positive", "shape", [True])
    yield field("shape-enormous", r"shape \[4611686018427387904\], not 1", "shape", [2**62])
    yield field("shape-rank", rf"shape \[{depth}, 1\], not 1 positive", "shape", [depth, 1])
    yield field("offsets-negative", r"data_offsets \[-4, 8\], which do not fit", "data_offsets", [-4, 8])
    yield field("offsets-short", r"data_offsets \[0, 1\], which do not fit", "data_offsets", [0, 1])
    far = [2**30, 2**30 + 4 * depth]
    yield field("offsets-far", "truncated within tensor 'tau'", "data_offsets", far)
    yield edited(
        "offsets-overlap",
        "overlap.*not a valid safetensors file",
        lambda header: header["tau"].update(data_offsets=[0, 4 * depth]),
    )
    yield shaped(
        "head-transposed", f"'head.weight' is for {width} classes, labels names 4", head_weight=torch.zeros(width, 4)
    )
    yield shaped("head-bias-short", "'head.bias' is for 3 classes, labels names 4", head_bias=torch.zeros(3))
    yield shaped("prompt-width", f"'prompt' has width 5, tensor 'head.weight' {width}", prompt=torch.zeros(1, 2, 5))
    too_many = MAX_PROMPTS + 1
    yield shaped("prompt-too-many", f"has {too_many} prompts, more than", prompt=torch.zeros(1, too_many, width))
    yield shaped("prompt-empty", rf"'prompt' has shape \[1, 0, {width}\]", prompt=torch.zeros(1, 0, width))
    yield shaped(
        "depths-disagree",
        f"disagree on the number of blocks: prompt 2, gamma {depth}, tau {depth}",
        prompt=torch.zeros(2, 1, width),
    )


def _shifts(spec: BackboneSpec) -> Iterator[Hostile]:
    """Vectors that no block can add."""
    width = spec.width

    def case(name: str, message: str, shift: torch.Tensor) -> Hostile:
        adapter = make_adapter(spec, name, shift=torch.zeros(spec.depth, 3, width))
        return Hostile(name, message, with_tensors(adapter, shift=shift))

    yield case("shift-flat", "tensor 'shift' has shape .*, not 3 positive", torch.zeros(spec.depth, 3 * width))
    yield case("shift-places", "tensor 'shift' has shape .*, not .blocks, 3, ", torch.zeros(spec.depth, 2, width))
    yield case("shift-width", "tensor 'shift' has shape .*, not .blocks, 3, ", torch.zeros(spec.depth, 3, width + 1))
    yield case("shift-depth", "disagree on the number of blocks", torch.zeros(spec.depth + 1, 3, width))
    yield case("shift-nan", "tensor 'shift' holds values", torch.full((spec.depth, 3, width), float("nan")))


def _unknown(spec: BackboneSpec) -> Iterator[Hostile]:
    """What tells strangers, and cannot."""
    width = spec.width

    def adapter(name: str) -> Adapter:
        return make_adapter(spec, name, unknown=make_unknown(width))

    def shaped(name: str, message: str, **tensors: torch.Tensor) -> Hostile:
        return Hostile(name, message, with_tensors(adapter(name), **tensors))

    def drop(header: Header) -> None:  # the last tensor of the file, so that the others stay where they are
        del header["unknown.scale"]

    yield shaped(
        "unknown-mean", f"'unknown.mean' has width 5, tensor 'head.weight' {width}", unknown_mean=torch.zeros(5)
    )
    yield shaped("unknown-scale", "'unknown.scale' has width 1, ", unknown_scale=torch.ones(1))
    yield shaped("unknown-basis", "'unknown.basis' has width 2, ", unknown_basis=torch.zeros(3, 2))
    yield shaped("unknown-flat", "'unknown.basis' has shape .*, not 2 positive", unknown_basis=torch.zeros(width))
    yield shaped("unknown-many-knots", "'unknown.knots' holds more than the 1000", unknown_knots=torch.zeros(1001))
    yield shaped("unknown-order", "'unknown.knots' must ascend", unknown_knots=torch.tensor([2.0, 1.0]))
    yield Hostile("unknown-part", "tensor 'unknown.scale' is missing", with_header(adapter("unknown-part"), drop))
    nan = with_value(adapter("unknown-nan"), "unknown.mean", float("nan"))
    yield Hostile("unknown-nan", "tensor 'unknown.mean' holds values", nan)
    mask = make_segmenter(spec, "unknown-mask")
    header, body = unpack(mask.to_bytes())
    for name, tensor in make_unknown(width).tensors().items():
        data = tensor.numpy().astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    yield Hostile("unknown-mask", "'unknown..' are for kind 'classification' alone", pack(header, body))


def _thresholds(spec: BackboneSpec) -> Iterator[Hostile]:
    """Labels of which an image may have several, and what they are given from."""

    def adapter(name: str) -> Adapter:
        return make_adapter(spec, name, threshold=torch.full((4,), 0.5))

    short = with_tensors(adapter("threshold-short"), threshold=torch.full((3,), 0.5))
    yield Hostile("threshold-short", "'threshold' is for 3 classes, labels names 4", short)
    high = with_value(adapter("threshold-high"), "threshold", 1.5)
    yield Hostile("threshold-high", "'threshold' must lie between 0 and 1", high)
    lone = with_metadata(adapter("threshold-alone"), multi_label=None)
    yield Hostile("threshold-alone", "several labels has both multi_label and tensor 'threshold'", lone)
    without = with_metadata(make_adapter(spec, "threshold-missing"), multi_label="true")
    yield Hostile("threshold-missing", "several labels has both multi_label and tensor 'threshold'", without)
    yield Hostile(
        "multi-label-odd",
        "multi_label 'yes' is not 'true'",
        with_metadata(adapter("multi-label-odd"), multi_label="yes"),
    )


def _values(spec: BackboneSpec) -> Iterator[Hostile]:
    """Numbers that would poison every answer."""
    for name, tensor, value in (
        ("nan-weight", "head.weight", float("nan")),
        ("infinite-bias", "head.bias", float("inf")),
        ("infinite-prompt", "prompt", float("-inf")),
        ("nan-gamma", "gamma", float("nan")),
        ("infinite-tau", "tau", float("inf")),
    ):
        yield Hostile(name, f"tensor '{tensor}' holds values", with_value(make_adapter(spec, name), tensor, value))
    yield Hostile("zero-tau", "tensor 'tau' must be positive", with_value(make_adapter(spec, "zero-tau"), "tau", 0.0))


def _metadata(spec: BackboneSpec) -> Iterator[Hostile]:
    """Strings and the JSON in them."""

    def case(name: str, message: str, **values: object) -> Hostile:
        return Hostile(name, message, with_metadata(make_adapter(spec, name), **values))

    preprocess = spec.preprocess.to_dict()
    without = {key: value for key, value in preprocess.items() if key != "std"}
    yield Hostile(
        "metadata-missing",
        "header holds no metadata",
        with_header(make_adapter(spec), lambda header: header.pop("__metadata__")),
    )
    yield case("metadata-number", "metadata holds values that are not strings", created=5)
    yield case("metadata-key-missing", "metadata key 'labels' is missing", labels=None)
    yield case("metadata-key-unknown", "metadata key 'author' is unknown", author="me")
    yield case("format-unknown", "format 'gpt-serve/3' is not 'gpt-serve/1' or 'gpt-serve/2'", format="gpt-serve/3")
    yield case("task-of-another", "file belongs to task 'elsewhere'", task="elsewhere")
    yield case("task-a-path", r"task name '\.\./x' is not allowed", task="../x")
    yield case("method-odd", r"method 'Gated\\n' is not 1 to 32", method="Gated\n")
    yield case("backbone-odd", "backbone is not 1 to 200 printable", backbone="vit\x1b[2J")
    yield case("fingerprint-short", "backbone_sha256 is not 64 hex digits", backbone_sha256="abc")
    yield case("pool-unknown", "pool 'max' is not one of cls, mean", pool="max")
    yield case("created-odd", r"created '2026-01-02\\n03:04:05Z' is not a UTC", created="2026-01-02\n03:04:05Z")
    yield case("created-elsewhere", r"created '.*\+02:00' is not a UTC", created="2026-01-02T03:04:05+02:00")
    yield case("created-never", "created '2026-02-30.*' is not a UTC", created="2026-02-30T03:04:05Z")
    for number, text in enumerate(("0", "-1", "1.0", "x", "00001", "\u0661")):
        yield case(f"first-block-{number}", "first_block '.*' is not a whole number", first_block=text)
    yield case("first-block-late", "disagree on the number of blocks", first_block="1")
    yield case("labels-not-json", "labels is not valid JSON", labels="cat, dog")
    yield case("labels-numbers", "labels is not a list of strings", labels="[1, 2, 3, 4]")
    yield case("labels-single", "labels must name at least two classes, not 1", labels='["a"]')
    yield case("labels-equal", "labels must all be different", labels='["a", "b", "c", "a"]')
    yield case("labels-empty", "labels must have 1 to 256 characters", labels='["a", "b", "c", ""]')
    yield case("labels-surrogate", "labels holds text that is not valid Unicode", labels=r'["a", "b", "c", "\ud800"]')
    yield case("labels-few", "'head.weight' is for 4 classes, labels names 3", labels='["a", "b", "c"]')
    yield case("preprocess-list", "preprocess is not a JSON object", preprocess="[]")
    yield case(
        "preprocess-key", "preprocess: unexpected or missing preprocess keys: std", preprocess=json.dumps(without)
    )
    yield case("preprocess-std", "preprocess: std must lie", preprocess=json.dumps(preprocess | {"std": [0, 0, 0]}))
    yield case("training-list", "training is not a JSON object", training="[]")
    yield case("training-twice", "training holds the key 'seed' twice", training='{"a": {"seed": 1, "seed": 2}}')
    yield case("training-nan", "training holds the number NaN, which", training='{"loss": NaN}')
    yield case("training-infinite", "training holds the number 1e400, which", training='{"loss": 1e400}')
    yield case("training-nesting", "training is not valid JSON", training="[" * 100_000)


def _taps(spec: BackboneSpec) -> Iterator[Hostile]:
    """What a head cannot read."""

    def case(name: str, message: str, taps: str) -> Hostile:
        return Hostile(name, message, with_metadata(make_adapter(spec, name), taps=taps))

    texts = ("[]", "{}", '[["cls", 1]]', '[[-1, "cls"]]', '[[1, "max"]]', "[[1]]", "[[true, 1]]")
    for number, text in enumerate(texts):
        yield case(f"taps-{number}", "taps '.*' is not a list of 1 to 64 pairs", text)
    yield case("taps-twice", "taps must all be different", '[[1, "cls"], [1, "cls"]]')
    yield case("taps-many", "columns for 7 taps of equal width", json.dumps([[block, "cls"] for block in range(7)]))
    late = make_adapter(spec, "foreign-tap", taps=(Tap(spec.depth, "cls"),))
    yield Hostile("foreign-tap", f"the head reads block {spec.depth}, the", late.to_bytes())
    early = make_adapter(spec, "early-mean", taps=(Tap(0, "mean"),))
    yield Hostile("early-mean", "the head reads prompts after block 0, which is not the last", early.to_bytes())


def _masks(spec: BackboneSpec) -> Iterator[Hostile]:
    """Heads for each patch that do not fit together, and what only they may have."""
    width = spec.width

    def case(name: str, message: str, base: str = "linear", **values: object) -> Hostile:
        make = {"linear": make_segmenter, "decoder": partial(make_segmenter, decoder=True), "plain": make_adapter}[base]
        return Hostile(name, message, with_metadata(make(spec, name), **values))

    def decoder(name: str, message: str, tensor: str, value: torch.Tensor | None) -> Hostile:
        adapter = make_segmenter(spec, name, decoder=True)
        tensors = {key: item for key, item in (adapter.decoder | {tensor: value}).items() if item is not None}
        whole = {"head.weight": adapter.head_weight, "head.bias": adapter.head_bias, **tensors}
        header, _ = unpack(adapter.to_bytes())
        return Hostile(name, message, to_file(whole, header["__metadata__"]))

    geometry = {mode: json.dumps(spec.preprocess.to_dict() | {"crop_mode": mode}) for mode in ("center", "windows")}
    yield case("kind-unknown", "kind 'detection' is not classification or segmentation", kind="detection")
    yield case("kind-missing", "reads every patch, as only one of kind 'segmentation'", kind=None)
    yield case("kind-pooled", "must read one or more taps of pooling 'grid'", taps='[[1, "cls"]]')
    yield case("kind-no-taps", "must read one or more taps of pooling 'grid'", taps=None)
    yield case("kind-raw", "must read one or more taps of pooling 'grid'", taps='[[1, "raw"]]')
    yield case("kind-mixed", "must read one or more taps of pooling 'grid'", taps='[[1, "grid"], [2, "cls"]]')
    yield case("crop-lossy", "crop_mode 'center' would lose the borders", preprocess=geometry["center"])
    yield case("crop-of-masks", "crop_mode 'windows' is for kind 'segm", "plain", preprocess=geometry["windows"])
    for number, text in enumerate(("255", "[256]", "[-1]", "[1.0]", "[true]", '["x"]')):
        yield case(f"ignore-{number}", "ignore '.*' is not a list of whole numbers", ignore=text)
    yield case("ignore-classes", "reads every patch, as only one of", "plain", ignore="[255]")
    yield case("decoder-grid", "must read one tap of pooling 'raw'", "decoder", taps='[[1, "grid"]]')
    yield case("decoder-taps", "must read one tap of pooling 'raw'", "decoder", taps='[[1, "raw"], [0, "raw"]]')
    yield case("decoder-no-kind", "reads every patch, as only one of kind", "decoder", kind=None)
    many = make_segmenter(spec, "mask-classes")
    labels = [str(number) for number in range(256)]
    tensors = {"head.weight": torch.zeros(256, width), "head.bias": torch.zeros(256)}
    metadata = unpack(many.to_bytes())[0]["__metadata__"] | {"labels": json.dumps(labels)}
    yield Hostile("mask-classes", "labels names 256 classes, a mask has 255 at most", to_file(tensors, metadata))
    yield decoder("decoder-missing", "tensor 'head.conv3.bias' of the decoder is missing", "head.conv3.bias", None)
    yield decoder("decoder-kernel", "'head.conv2.weight' has shape", "head.conv2.weight", torch.zeros(5, 5, 1, 1))
    yield decoder("decoder-norm", "'head.norm.bias' has shape", "head.norm.bias", torch.zeros(width + 1))
    yield decoder("decoder-flat", "'head.conv1.weight' has shape .*, not 4", "head.conv1.weight", torch.zeros(5, width))
    yield decoder("decoder-unknown", "unknown tensor 'head.conv5.bias'", "head.conv5.bias", torch.zeros(5))
    nan = torch.full((5,), float("nan"))
    yield decoder("decoder-nan", "tensor 'head.conv4.bias' holds values", "head.conv4.bias", nan)


def _foreign(spec: BackboneSpec) -> Iterator[Hostile]:
    """Valid adapters of other backbones; all but the first pretend to be of this one."""
    other = replace(spec, name="vit_foreign", fingerprint="cd" * 32)
    side = spec.preprocess.input_size[0] * 2
    larger = replace(spec, preprocess=replace(spec.preprocess, input_size=(side, side)))
    yield Hostile(
        "foreign-backbone",
        rf"trained on backbone vit_foreign \({'cd' * 6}\), not on {spec.name} \({spec.fingerprint[:12]}\)",
        make_adapter(other, "foreign-backbone").to_bytes(),
        BackboneMismatch,
    )
    for name, message, pretender in (
        ("foreign-width", f"width 8 is not the backbone's {spec.width}", replace(spec, width=8)),
        ("foreign-depth", f"for {spec.depth + 1} blocks, the backbone has", replace(spec, depth=spec.depth + 1)),
    ):
        yield Hostile(name, message, make_adapter(pretender, name).to_bytes())
    yield Hostile(
        "foreign-input-size",
        rf"trained on backbone {spec.name} at {side} x {side} pixels, not at .*--input-size {side} or train again",
        make_adapter(larger, "foreign-input-size").to_bytes(),
        BackboneMismatch,
    )
