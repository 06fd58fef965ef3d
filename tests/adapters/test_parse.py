"""The parser of adapter files against the safetensors library, which parses none of the metadata."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from gpt_serve.adapters.parse import ParseError, parse, parse_labels, parse_preprocess
from tests.factories import TINY_SPEC, make_adapter
from tests.hostile_adapters import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_those_that_the_library_reads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "head.weight": torch.randn(4, 16, generator=generator),
        "head.bias": torch.tensor([1e-8, -65504.0, 0.0, 6e-5]),
        "gamma": torch.tensor([float("inf"), float("-inf")]),
        "prompt": torch.randn(1, 3, 16, generator=generator),
    }
    data = save({name: tensor.to(dtype) for name, tensor in tensors.items()})
    header, body = unpack(data)
    header["__metadata__"] = unpack(make_adapter().to_bytes())[0]["__metadata__"]
    found = parse(pack(header, body)).tensors()
    expected = load(data)
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.dtype == np.float32 and array.flags.writeable
        assert torch.equal(torch.from_numpy(array), expected[name].float()), name


def test_what_is_read_of_a_mutated_file_is_what_the_library_reads() -> None:
    good, rng = make_adapter().to_bytes(), np.random.default_rng(1)
    start, read = 8 + int.from_bytes(good[:8], "little"), 0
    for _ in range(1000):
        data = bytearray(good)
        for at in rng.integers(0, rng.choice([8, start, len(data)]), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        try:
            tensors = parse(bytes(data)).tensors()
        except ParseError:
            continue
        read += 1
        for name, expected in load(bytes(data)).items():
            assert torch.equal(torch.from_numpy(tensors[name]), expected.float())
    assert read > 50


def test_a_preprocess_is_parsed_to_the_fields_of_the_spec() -> None:
    text = json.dumps(TINY_SPEC.preprocess.to_dict())
    assert type(TINY_SPEC.preprocess)(**parse_preprocess(text)) == TINY_SPEC.preprocess


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_size", [16]),
        ("input_size", [16, 16.5]),
        ("input_size", [0, 16]),
        ("crop_pct", 0.01),
        ("crop_pct", True),
        ("crop_mode", "border"),
        ("interpolation", ["bicubic"]),
        ("mean", "abc"),
        ("std", [1, 1, 1e-9]),
        ("exif", 1),
        ("\ud800", 1),
    ],
)
def test_a_preprocess_out_of_range_is_refused(key: str, value: object) -> None:
    with pytest.raises(ParseError, match="^preprocess"):
        parse_preprocess(json.dumps(TINY_SPEC.preprocess.to_dict() | {key: value}))


def test_labels() -> None:
    assert parse_labels('["a", "b"]') == ["a", "b"]
    with pytest.raises(ParseError, match="labels holds the number 1e999"):
        parse_labels("[1e999]")
