"""Bodies: what a valid one holds is bounded before it is parsed."""

import base64
import json
from typing import Any

import pytest

from gpt_serve.errors import InvalidRequest
from gpt_serve.serve import inputs
from gpt_serve.serve.forms import Form
from gpt_serve.serve.inputs import MAX_TASKS, PredictRequest, parse
from gpt_serve.serve.problems import HTTPError

JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b'{"":{"":0}},' * 800_000 + b"0]",
        b'{"task":"a","image":"b"' + b',"a":1' * 10_000 + b"}",
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
    form = Form(FORM["content-type"], 72)
    with pytest.raises(InvalidRequest, match="more than 72 parts"):
        form.parse(part * 100_000)
    assert len(form.parts) == 72


@pytest.mark.parametrize("length", [0, 1, 2, 3, 196_607, 196_608, 196_609, 500_000])
def test_base64_in_slices_is_base64(length: int) -> None:
    """With line breaks wherever they fall, and of any length around that of a slice."""
    data = b"\xff\xd8\xff" + bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    assert inputs._base64(base64.encodebytes(data).decode()) == data
    assert inputs._base64(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize("text", ["YQ==" + "YWFh" * 100_000, "Y", "YW=h", "/9j/" * 70_000 + "Y", "YWFh!"])
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
    assert wanted == PredictRequest(("birds",), (b"--\r\n--\r\n-- b\r\n",))


def test_a_raw_body_needs_its_task_in_the_path() -> None:
    with pytest.raises(HTTPError):
        parse({"content-type": "image/png"}, (), b"x")
    assert parse({"content-type": "image/png"}, (), b"x", "birds").images == (b"x",)
    assert parse({}, [("top_k", "2")], b"x", "birds").top_k == 2
    assert parse(JSON, (), b'{"image": "eA==", "top_k": 2.0}', "birds").top_k == 2
    wanted = parse(JSON, (), json.dumps({"image": ["eA==", "eQ=="]}).encode(), "birds")
    assert wanted.images == (b"x", b"y") and wanted.several_images


def form(*fields: tuple[str, str]) -> bytes:
    """A form with these fields and an image."""
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    image = '--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nx\r\n--b--\r\n'
    return "".join([*parts, image]).encode()


def body(**fields: Any) -> bytes:
    return json.dumps({"image": "eA=="} | fields).encode()


@pytest.mark.parametrize(
    "wanted",
    [
        parse(FORM, (), form(("task", "birds"), ("task", "cars"))),
        parse(FORM, [("task", "birds"), ("task", "cars")], form()),
        parse(FORM, [("task", "birds"), ("task", "cars")], form(("task", "birds"), ("task", "cars"))),
        parse(JSON, (), body(task=["birds", "cars"])),
    ],
    ids=["form", "query", "both", "json"],
)
def test_several_tasks(wanted: PredictRequest) -> None:
    assert wanted == PredictRequest(("birds", "cars"), (b"x",), several_tasks=True)


def test_a_list_of_one_task_is_a_list() -> None:
    assert parse(JSON, (), body(task=["birds"])).several_tasks
    assert not parse(JSON, (), body(task="birds")).several_tasks
    assert not parse(FORM, (), form(("task", "birds"))).several_tasks


@pytest.mark.parametrize("wanted", [parse(FORM, [("tasks", "*")], form()), parse(JSON, (), body(tasks="*"))])
def test_all_tasks(wanted: PredictRequest) -> None:
    assert wanted == PredictRequest(None, (b"x",), several_tasks=True)


NAMES = [f"t{number}" for number in range(10_000)]


@pytest.mark.parametrize(
    ("query", "content", "says"),
    [
        ((), body(task=[]), "'task' is missing or empty"),
        ((), body(task=["birds", ""]), "'task' is missing or empty"),
        ([("task", "birds"), ("task", "")], body(), "'task' is missing or empty"),
        ((), body(task=NAMES), "too much JSON: send an object with at most 256 tasks"),
        ((), body(task=NAMES[: MAX_TASKS + 1]), "257 tasks, more than the 256 allowed"),
        ([("task", name) for name in NAMES], body(), "10000 tasks, more than the 256 allowed"),
        ((), body(task=["birds", "cars", "birds"]), "'birds' is given twice"),
        ([("task", "birds"), ("task", "birds")], body(), "'birds' is given twice"),
        ([("task", "cars")], body(task=["birds", "cars"]), "task is given twice with different values"),
        ((), body(task=["birds", 1]), "must be a string or a list of strings"),
        ((), body(task=[["birds"]]), "must be a string or a list of strings"),
        ((), body(task=None), "must be a string or a list of strings"),
        ((), body(tasks="birds"), "tasks can only be"),
        ((), body(task="birds", mask=None), "mask must be one of png, rle, none"),
        ([("mask", "svg")], body(task="birds"), "mask must be one of png, rle, none"),
        ((), body(tasks=["*"]), "tasks can only be"),
        ([("tasks", "*")], body(task="birds"), "both given"),
    ],
)
def test_what_no_list_of_tasks_is(query: list[tuple[str, str]], content: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse(JSON, query, content)


def test_a_form_with_ten_thousand_tasks_is_not_parsed_to_its_end() -> None:
    with pytest.raises(InvalidRequest, match="more than 328 parts"):
        parse(FORM, (), form(*(("task", name) for name in NAMES)))


def test_the_task_of_the_path_is_the_only_one() -> None:
    for fields in ({"task": ["birds", "cars"]}, {"task": ["birds"]}, {"tasks": "*"}):
        with pytest.raises(InvalidRequest):
            parse(JSON, (), body(**fields), "birds")


@pytest.mark.parametrize("size", [3, 100, 700, 10**6])
def test_of_what_is_no_image_the_first_bytes_are_enough(size: int) -> None:
    """Megabytes that are none are neither decoded from base64 nor carried to the worker; images stay whole."""
    nothing, picture = bytes([7]) * size, b"\x89PNG\r\n\x1a\n" + bytes([7]) * size
    for data, kept in ((nothing, nothing[:64]), (picture, picture)):
        text = base64.encodebytes(data).decode()
        asked = [
            parse({"content-type": "image/png"}, (), data, "birds"),
            parse({"content-type": "application/json"}, (), json.dumps({"image": text}).encode(), "birds"),
            parse(
                {"content-type": "application/json"},
                (),
                json.dumps({"image": ["data:;base64," + text]}).encode(),
                "birds",
            ),
        ]
        assert [request.images for request in asked] == [(kept,)] * 3
