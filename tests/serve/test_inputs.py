"""Bodies: what a valid one holds is bounded before it is parsed."""

import base64
import json
from typing import Any

import pytest

from gpt_serve.errors import InvalidRequest
from gpt_serve.serve import inputs
from gpt_serve.serve.inputs import parse
from gpt_serve.serve.problems import HTTPError

JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b'{"":{"":0}},' * 800_000 + b"0]",
        b'{"task":"a","image":"b"' + b',"a":1' * 1000 + b"}",
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b"[" + b"1," * 1_000_000 + b"1]",
    ],
    ids=["objects", "keys", "brackets", "nested", "commas"],
)
def test_hostile_json_is_not_parsed(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten megabytes of it took three seconds of the event loop each."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(inputs.json, "loads", refuse)
    with pytest.raises(InvalidRequest, match="too much JSON"):
        parse(JSON, (), body)


def test_many_parts_are_not_parsed_to_their_end() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n'
    form = inputs._Form(FORM["content-type"])
    with pytest.raises(InvalidRequest, match="more than 72 parts"):
        form.parse(part * 100_000)
    assert len(form.parts) == 72


@pytest.mark.parametrize("length", [0, 1, 2, 3, 196_607, 196_608, 196_609, 500_000])
def test_base64_in_slices_is_base64(length: int) -> None:
    """With line breaks wherever they fall, and of any length around that of a slice."""
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    assert inputs._base64(base64.encodebytes(data).decode()) == data
    assert inputs._base64(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize("text", ["YQ==" + "YWFh" * 100_000, "Y", "YW=h", "YWFh" * 70_000 + "Y", "YWFh!"])
def test_what_is_not_base64(text: str) -> None:
    with pytest.raises(InvalidRequest):
        inputs._base64(text)


def test_names_and_values_of_a_form_are_what_they_are() -> None:
    """A boundary inside a file, header names in any case, a file's name in any form."""
    body = (
        b"--b\r\nCONTENT-disposition: form-data; name=task\r\n\r\nbirds\r\n"
        b'--b\r\nContent-Type: image/png\r\nContent-Disposition: form-data; name="image"; filename="a; b"\r\n\r\n'
        b"--\r\n--\r\n-- b\r\n\r\n--b--\r\nepilogue"
    )
    wanted = parse(FORM, (), body)
    assert (wanted.task, wanted.images, wanted.several) == ("birds", (b"--\r\n--\r\n-- b\r\n",), False)


def test_a_raw_body_needs_its_task_in_the_path() -> None:
    with pytest.raises(HTTPError):
        parse({"content-type": "image/png"}, (), b"x")
    assert parse({"content-type": "image/png"}, (), b"x", "birds").images == (b"x",)
    assert parse({}, [("top_k", "2")], b"x", "birds").top_k == 2
    assert parse(JSON, (), b'{"image": "eA==", "top_k": 2.0}', "birds").top_k == 2
    wanted = parse(JSON, (), json.dumps({"image": ["eA==", "eQ=="]}).encode(), "birds")
    assert wanted.images == (b"x", b"y") and wanted.several
