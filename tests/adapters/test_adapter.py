"""The adapter file: what is written comes back, and nothing else gets in."""

import dataclasses
import json
import random
import struct

import pytest
import torch

from gpt_serve.adapters.adapter import Adapter, revision_of
from gpt_serve.adapters.file import FORMAT
from gpt_serve.adapters.parse import MAX_FILE_BYTES, MAX_HEADER_BYTES, Parsed
from gpt_serve.errors import AdapterError, BackboneMismatch, InvalidAdapter
from tests.factories import TINY_SPEC, make_adapter
from tests.hostile_adapters import pack, unpack, with_header, with_tensors, with_value
from tests.tiny_vit import METHODS

TENSORS = ("head_weight", "head_bias", "prompt", "gamma", "tau")


def assert_same(first: Adapter, second: Adapter) -> None:
    for field in dataclasses.fields(Adapter):
        mine, theirs = getattr(first, field.name), getattr(second, field.name)
        if isinstance(mine, torch.Tensor):
            assert theirs.dtype == torch.float32
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method):
    adapter = make_adapter(method=method)
    assert_same(adapter, Adapter.from_bytes(adapter.to_bytes()))


@pytest.mark.parametrize(
    ("method", "layers", "present"),
    [
        ("linear", 0, ()),
        ("vpt-shallow", 1, ("prompt",)),
        ("vpt-deep", 3, ("prompt",)),
        ("gated", 1, ("prompt", "gamma", "tau")),
    ],
)
def test_what_a_method_does_not_learn_is_not_in_the_file(method, layers, present):
    data = make_adapter(method=method, prompts=5).to_bytes()
    adapter = Adapter.from_bytes(data)
    assert set(unpack(data)[0]) == {"__metadata__", "head.weight", "head.bias", *present}
    assert adapter.prompts == (5 if layers else 0)
    assert adapter.deep == (layers > 1)


def test_round_trip_with_a_single_block():
    """It has no gate: gamma is empty, and one layer of prompts is not deep."""
    adapter = make_adapter(dataclasses.replace(TINY_SPEC, depth=1), deep=True)
    loaded = Adapter.from_bytes(adapter.to_bytes())
    assert_same(adapter, loaded)
    assert loaded.gamma.shape == (0,)
    assert not loaded.deep


def test_hard_gates_stay_infinite():
    gamma = Adapter.from_bytes(make_adapter(method="gated-hard").to_bytes()).gamma
    assert gamma.tolist() == [float("inf"), float("-inf")]


def test_text_of_any_language_comes_back():
    adapter = make_adapter(
        labels=["Löwenzahn", "蒲公英", "🌼", 'a "quoted"\\ one'], training={"note": "grüß", "n": [1]}
    )
    assert_same(adapter, Adapter.from_bytes(adapter.to_bytes()))


def test_the_longest_values_are_allowed():
    adapter = make_adapter(labels=["x" * 256, "y"], backbone="b" * 200, task="t" * 64)
    adapter = dataclasses.replace(adapter, method="m" * 32)
    assert_same(adapter, Adapter.from_bytes(adapter.to_bytes()))


@pytest.mark.parametrize("created", ["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.678901+00:00"])
def test_times_in_utc(created):
    assert Adapter.from_bytes(make_adapter(created=created).to_bytes()).created == created


def test_equal_adapters_give_equal_bytes():
    assert len({make_adapter(seed=7).to_bytes() for _ in range(20)}) == 1
    assert make_adapter(seed=7).to_bytes() != make_adapter(seed=8).to_bytes()


def test_loading_and_saving_keeps_the_revision():
    data = make_adapter().to_bytes()
    assert Adapter.from_bytes(data).to_bytes() == data


def test_revision():
    assert revision_of(b"") == "e3b0c44298fc"
    assert revision_of(b"x") != revision_of(b"y")


def test_the_file_is_what_the_design_says():
    """Read here with nothing but ``json`` and ``struct``."""
    adapter = make_adapter(classes=2)
    header, body = unpack(adapter.to_bytes())
    metadata = header.pop("__metadata__")
    assert metadata["format"] == FORMAT == "gpt-serve/2"
    assert json.loads(metadata["labels"]) == ["class-0", "class-1"]
    assert json.loads(metadata["preprocess"])["input_size"] == [16, 16]
    assert {name: entry["shape"] for name, entry in header.items()} == {
        "prompt": [1, 3, 16],
        "gamma": [2],
        "tau": [3],
        "head.weight": [2, 16],
        "head.bias": [2],
    }
    start, end = header["tau"]["data_offsets"]
    assert list(struct.unpack("<3f", body[start:end])) == adapter.tau.tolist()


def test_saving_takes_tensors_as_training_has_them():
    """Views of one another, not contiguous, with gradients, in other precisions."""
    base = torch.randn(16, 9, dtype=torch.float64, requires_grad=True)
    adapter = make_adapter(head_weight=base.T[:4], head_bias=base[:4, 8])
    loaded = Adapter.from_bytes(adapter.to_bytes())
    assert torch.equal(loaded.head_weight, base.detach().T[:4].float())
    assert torch.equal(loaded.head_bias, base.detach()[:4, 8].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_converted(dtype):
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    bias = torch.tensor([1.5, -2.0, 0.25, 3.0], dtype=dtype)
    data = bytes(bias.view(torch.uint8).tolist())
    header, _ = unpack(make_adapter(method="linear").to_bytes())
    weight = struct.pack("<64f", *range(64))
    header["head.weight"]["data_offsets"] = [0, 256]
    header["head.bias"] = {"dtype": names[dtype], "shape": [4], "data_offsets": [256, 256 + len(data)]}
    loaded = Adapter.from_bytes(pack(header, weight + data))
    assert loaded.head_bias.dtype == torch.float32
    assert loaded.head_bias.tolist() == bias.tolist()


def test_a_double_that_float32_cannot_hold_is_refused():
    header, _ = unpack(make_adapter(method="linear").to_bytes())
    header["head.weight"]["data_offsets"] = [0, 256]
    header["head.bias"] = {"dtype": "F64", "shape": [4], "data_offsets": [256, 288]}
    with pytest.raises(InvalidAdapter, match=r"'head\.bias' holds values that are not finite"):
        Adapter.from_bytes(pack(header, bytes(256) + struct.pack("<4d", 1e300, 0, 0, 0)))


def test_a_header_without_padding_is_read():
    header, body = unpack(make_adapter().to_bytes())
    text = json.dumps(header).encode()
    for spaces in range(8):
        assert Adapter.from_bytes(pack(text + b" " * spaces, body)).task == "alpha"


def test_limits_are_exact():
    header, body = unpack(make_adapter().to_bytes())
    text = json.dumps(header).encode()
    padded = text + b" " * (MAX_HEADER_BYTES - len(text))
    assert Adapter.from_bytes(pack(padded, body)).task == "alpha"
    with pytest.raises(InvalidAdapter, match="a header of more than the 1048576 bytes"):
        Adapter.from_bytes(pack(padded + b" ", body))
    assert MAX_FILE_BYTES == 256 * 2**20


def test_no_tensor_is_made_before_everything_is_checked(monkeypatch):
    good = make_adapter().to_bytes()
    wide = with_tensors(make_adapter(), prompt=torch.zeros(1, 2, 5))
    late = with_header(make_adapter(), lambda header: header["__metadata__"].update(training="[]"))

    def refuse(data):
        raise AssertionError("a tensor was made")

    monkeypatch.setattr(Parsed, "tensors", refuse)
    for data in (wide, late):
        with pytest.raises(InvalidAdapter):
            Adapter.from_bytes(data)
    with pytest.raises(AssertionError, match="a tensor was made"):
        Adapter.from_bytes(good)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "../x"}, "task name '../x'"),
        ({"labels": ("a", "a", "b", "c")}, "labels must all be different"),
        ({"labels": ("a", "\ud800", "b", "c")}, "the header is not UTF-8"),
        ({"method": "Gated"}, "method 'Gated'"),
        ({"training": {"loss": float("nan")}}, "training holds the number NaN"),
        ({"head_bias": torch.full((4,), float("nan"))}, "'head.bias' holds values"),
        ({"prompt": torch.zeros(1, 2, 5)}, "'prompt' has width 5"),
        ({"tau": torch.ones(4)}, "gamma 3, tau 4"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(fields, message):
    with pytest.raises(InvalidAdapter, match=message):
        make_adapter(**fields).to_bytes()


def test_check_backbone():
    for method in METHODS:
        make_adapter(method=method).check_backbone(TINY_SPEC)
    with pytest.raises(BackboneMismatch, match=r"on backbone tiny \(abababababab\), not on other \(cdcdcdcdcdcd\)"):
        make_adapter().check_backbone(dataclasses.replace(TINY_SPEC, name="other", fingerprint="cd" * 32))


@pytest.mark.parametrize("pools", [("cls", "mean"), ("mean", "attention")], ids=str)
@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
def test_pooling_that_the_backbone_has_not(pool, pools):
    """Without a CLS token the first row is a patch, which would be classified without a word."""
    spec = dataclasses.replace(TINY_SPEC, pools=pools)
    adapter = make_adapter(pool=pool)
    if pool in pools:
        adapter.check_backbone(spec)
    else:
        with pytest.raises(InvalidAdapter, match=f"reads the pooling '{pool}', which the backbone does not have"):
            adapter.check_backbone(spec)


@pytest.mark.parametrize("fingerprint", [TINY_SPEC.fingerprint, "cd" * 32], ids=["of weights", "older"])
def test_the_same_backbone_at_another_size_is_told_by_the_size(fingerprint):
    size = dataclasses.replace(TINY_SPEC.preprocess, input_size=(48, 48))
    told = "on backbone tiny at 16 x 16 pixels, not at 48 x 48: load it with --input-size 16 or train again"
    with pytest.raises(BackboneMismatch, match=told):
        make_adapter().check_backbone(dataclasses.replace(TINY_SPEC, fingerprint=fingerprint, preprocess=size))


@pytest.mark.parametrize(("method", "name"), [("vpt-deep", "prompt"), ("gated", "gamma")])
def test_check_backbone_counts_blocks(method, name):
    with pytest.raises(InvalidAdapter, match=f"{name} is for 3 blocks, the backbone has 4"):
        make_adapter(method=method).check_backbone(dataclasses.replace(TINY_SPEC, depth=4))


def test_check_backbone_counts_blocks_of_tau_alone():
    adapter = dataclasses.replace(make_adapter(), gamma=None)
    with pytest.raises(InvalidAdapter, match="tau is for 3 blocks, the backbone has 4"):
        adapter.check_backbone(dataclasses.replace(TINY_SPEC, depth=4))


def mutations(data: bytes, count: int, rng: random.Random):
    """``data`` with some bits flipped, mostly in the header, or a piece cut out, doubled or overwritten."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(count):
        mutated = bytearray(data)
        start = rng.randrange(header_end if rng.random() < 0.8 else len(data))
        kind = rng.randrange(5)
        if kind == 0:
            del mutated[start : start + rng.randrange(1, 20)]
        elif kind == 1:
            mutated[start:start] = mutated[start : start + rng.randrange(1, 20)]
        elif kind == 2:
            mutated[start : start + 1] = rng.choice([b"0", b"9", b"-", b"]", b"}", b'"', b"\\", b"\xff", b"\0", b"[["])
        else:
            for _ in range(rng.randrange(1, 4)):
                mutated[rng.randrange(start, min(start + 8, len(data)))] ^= 1 << rng.randrange(8)
        yield bytes(mutated)


@pytest.mark.parametrize("method", ["gated", "vpt-deep", "linear"])
def test_a_damaged_file_is_refused_or_still_a_valid_adapter(method):
    original = make_adapter(method=method)
    shapes = {name: getattr(original, name).shape for name in TENSORS if getattr(original, name) is not None}
    refused = loaded = 0
    for data in mutations(original.to_bytes(), 1500, random.Random(3)):
        try:
            adapter = Adapter.from_bytes(data)
        except AdapterError as error:
            assert str(error).isprintable(), error
            refused += 1
            continue
        assert {name: getattr(adapter, name).shape for name in shapes} == shapes
        assert_same(adapter, Adapter.from_bytes(adapter.to_bytes()))
        loaded += 1
    assert refused > 300
    assert loaded > 20


def test_gamma_may_be_infinite_and_nothing_else():
    assert Adapter.from_bytes(with_value(make_adapter(), "gamma", float("-inf"))).gamma[0] == float("-inf")
    for name in ("prompt", "tau", "head.weight", "head.bias"):
        with pytest.raises(InvalidAdapter, match=f"'{name}' holds values that are not finite"):
            Adapter.from_bytes(with_value(make_adapter(), name, float("inf")))
