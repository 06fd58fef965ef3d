"""Triton's configuration against the adapter that it is for, and against the graph that is exported from it."""

import json
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "export" / "triton" / "flowers"
TYPES = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)"}

Message = dict[str, list[Any]]


def parse_text_proto(text: str) -> Message:
    """The fields of a text-format protobuf message, each with all of its values; enums are strings.

    Raises:
        ValueError: not the subset of the format that is needed here.
    """
    tokens = re.findall(r'"[^"\n]*"|[\w.+-]+|[{}\[\]:,]|\S', re.sub(r"#.*", "", text))
    message, rest = _fields(tokens)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}")
    return message


def _fields(tokens: list[str]) -> tuple[Message, list[str]]:
    message: Message = {}
    while tokens and tokens[0] != "}":
        name, tokens = tokens[0], tokens[1:]
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not the name of a field")
        if tokens[0] == ":":
            tokens = tokens[1:]
        elif tokens[0] not in "{[":
            raise ValueError(f"field {name} has no value")
        values, tokens = _values(tokens)
        message.setdefault(name, []).extend(values)
    return message, tokens


def _values(tokens: list[str]) -> tuple[list[Any], list[str]]:
    if tokens[0] != "[":
        value, tokens = _value(tokens)
        return [value], tokens
    values, tokens = [], tokens[1:]
    while tokens[0] != "]":
        value, tokens = _value(tokens)
        values.append(value)
        if tokens[0] == ",":
            tokens = tokens[1:]
    return values, tokens[1:]


def _value(tokens: list[str]) -> tuple[Any, list[str]]:
    first, tokens = tokens[0], tokens[1:]
    if first == "{":
        message, tokens = _fields(tokens)
        if tokens[:1] != ["}"]:
            raise ValueError("a message does not end")
        return message, tokens[1:]
    if first.startswith('"'):
        return first[1:-1], tokens
    return (int(first) if re.fullmatch(r"-?\d+", first) else first), tokens


@pytest.fixture(scope="module")
def config() -> Message:
    return parse_text_proto((MODEL / "config.pbtxt").read_text())


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return AdapterStore(ROOT / "adapters" / "mae-vit-tiny-32").load("flowers").adapter


def labels(config: Message) -> list[str]:
    (output,) = config["output"]
    (name,) = output["label_filename"]
    return (MODEL / name).read_text().splitlines()


def test_the_reader_reads_text_format() -> None:
    text = 'a: 1 # no\nb { c: "x y" c: KIND }\nd [ { e: [ 2, -3 ] }, { e: 4 } ]\nf: [ ]'
    expected = {"a": [1], "b": [{"c": ["x y", "KIND"]}], "d": [{"e": [2, -3]}, {"e": [4]}], "f": []}
    assert parse_text_proto(text) == expected


@pytest.mark.parametrize("text", ["a 1", "a: 1 }", "a { b: 1", "1: 2", "a: { b: 1 ] }"])
def test_the_reader_refuses_what_is_not_text_format(text: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        parse_text_proto(text)


def test_the_model_is_where_its_name_says(config: Message) -> None:
    assert config["name"] == [MODEL.name]
    assert config["platform"] == ["onnxruntime_onnx"]
    command = re.search(r"gpt-serve export --task (\S+) --output (\S+)", (MODEL / "config.pbtxt").read_text())
    assert command is not None
    assert (command[1], ROOT / command[2]) == (MODEL.name, MODEL / "1" / "model.onnx")


def test_requests_are_batched(config: Message) -> None:
    assert config["max_batch_size"] == [32]
    (batching,) = config["dynamic_batching"]
    assert 0 < batching["max_queue_delay_microseconds"][0] <= 10_000
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_AUTO"]}]


def test_it_is_for_the_shipped_adapter(config: Message, adapter: Adapter) -> None:
    (images,), (probabilities,) = config["input"], config["output"]
    assert images["dims"] == [*adapter.preprocess.input_size, 3]
    assert probabilities["dims"] == [len(adapter.labels)]
    assert labels(config) == list(adapter.labels)


@pytest.mark.slow
def test_it_is_for_the_exported_graph(config: Message, flowers_graph: Path) -> None:
    session = onnxruntime.InferenceSession(flowers_graph, providers=["CPUExecutionProvider"])
    for declared, found in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
        described = [(item["name"][0], TYPES[item["data_type"][0]], item["dims"]) for item in declared]
        given = [(item.name, item.type, item.shape[1:]) for item in found]
        assert described == given[: len(described)]  # what tells strangers may follow
        assert all(item.shape[0] == "batch" for item in found)  # Triton implies this axis
    assert labels(config) == json.loads(session.get_modelmeta().custom_metadata_map["labels"])
