"""The contract, one status code after another, from outside the process."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from tests.serve.conftest import encode
from tests.serve.harness import ServerProcess, check_problem, raw


def post(server: ServerProcess, **kwargs: object) -> httpx.Response:
    return server.client.post(server.url + "/predict", **kwargs)  # type: ignore[arg-type]


def b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.fixture(scope="session")
def engine(adapters: Path, bundled: Backbone) -> Engine:
    return Engine(bundled, AdapterStore(adapters, bundled.spec))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_answers_what_the_engine_answers(server: ServerProcess, engine: Engine, kind: str) -> None:
    image = encode(7, kind)
    expected = engine.predict([("birds", image)])[0]
    response = server.predict("birds", image, top_k="3")
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"task", "revision", "predictions"}
    assert (body["task"], body["revision"]) == ("birds", expected.revision)
    assert [entry["label"] for entry in body["predictions"]] == [label for label, _ in expected.top(3)]
    assert [entry["probability"] for entry in body["predictions"]] == pytest.approx(
        [probability for _, probability in expected.top(3)], abs=1e-5
    )


def test_form_json_and_query_agree(server: ServerProcess, image: bytes) -> None:
    form = server.predict("cars", image).json()
    assert len(form["predictions"]) == 5 or len(form["predictions"]) < 5  # the default is 5, or all classes
    file = {"image": ("x", image)}
    same = [
        post(server, json={"task": "cars", "image": b64(image)}),
        post(server, json={"task": "cars", "image": base64.encodebytes(image).decode(), "top_k": 5}),
        post(server, files=file, params={"task": "cars"}),
        post(server, files=file, data={"task": "cars", "top_k": "5"}, params={"task": "cars", "top_k": "5"}),
        post(server, json={"image": b64(image)}, params={"task": "cars"}),
    ]
    for response in same:
        assert response.status_code == 200 and response.json() == form


def test_top_k(server: ServerProcess, image: bytes) -> None:
    assert len(server.predict("birds", image, top_k="1").json()["predictions"]) == 1
    everything = server.predict("birds", image, top_k="1000").json()["predictions"]
    assert sum(entry["probability"] for entry in everything) == pytest.approx(1, abs=1e-4)


GOOD = {"task": "birds", "image": b64(encode(0))}


@pytest.mark.parametrize(
    "body",
    [
        {"image": GOOD["image"]},
        {"task": "birds"},
        {"task": "", "image": GOOD["image"]},
        {"task": "birds", "image": ""},
        {"task": 3, "image": GOOD["image"]},
        {"task": [3], "image": GOOD["image"]},
        {"task": None, "image": GOOD["image"]},
        {"task": "birds", "image": 3},
        {"task": "birds", "image": "not base64!"},
        {"task": "birds", "image": "abc"},
        {"task": "birds", "image": "h\u00e9"},
        GOOD | {"top_k": 0},
        GOOD | {"top_k": 1001},
        GOOD | {"top_k": True},
        GOOD | {"top_k": 1.5},
        GOOD | {"top_k": 1e999},
        GOOD | {"top_k": "five"},
        GOOD | {"top_k": None},
        GOOD | {"extra": 1},
        GOOD | {"task": "../x"},
        GOOD | {"task": "Birds"},
        GOOD | {"task": "a" * 65},
        GOOD | {"task": "\ud800"},
        GOOD | {"task": "birds\u0000"},
        [GOOD],
        "birds",
        3,
        None,
    ],
)
def test_400_json(server: ServerProcess, body: object) -> None:
    response = post(server, content=json.dumps(body), headers={"content-type": "application/json"})
    check_problem(response, 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
        b'{"task": NaN}',
        b'{"task": "birds", "task": "cars"}',
        b"\x00" * 1000,
    ],
)
def test_400_broken_json(server: ServerProcess, body: bytes) -> None:
    check_problem(post(server, content=body, headers={"content-type": "application/json"}), 400)


FILE = ("x.png", encode(0))


@pytest.mark.parametrize(
    "form",
    [
        {"files": [("image", FILE)]},
        {"files": [("image", FILE)], "data": {"task": ""}},
        {"files": [("task", (None, b"birds"))]},
        {"files": [("task", (None, b"birds")), ("image", (None, b"text"))]},
        {"files": [("task", ("task.txt", b"birds")), ("image", FILE)]},
        {"files": [("image", FILE)] * 65, "data": {"task": "birds"}},
        {"files": [("image", FILE), ("image", ("x.png", b""))], "data": {"task": "birds"}},
        {"files": [("image", FILE)], "data": {"task": ["birds", "birds"]}},
        {"files": [("image", FILE)], "data": {"task": "birds", "other": "x"}},
        {"files": [("image", FILE)], "data": {"task": "birds", "top_k": "0"}},
        {"files": [("image", FILE)], "data": {"task": "birds", "top_k": "-1"}},
        {"files": [("image", FILE)], "data": {"task": "birds", "top_k": "\u0665"}},
        {"files": [("image", FILE)], "data": {"task": "birds" * 1000}},
        {"files": [("image", FILE)], "data": {"task": "birds"}, "params": {"task": "cars"}},
        {"files": [("image", FILE)], "data": {"task": "birds", "top_k": "3"}, "params": {"top_k": "4"}},
        {"files": [("image", FILE)], "data": {"task": "birds"}, "params": {"topk": "4"}},
        {"files": [("image", ("x.png", b""))], "data": {"task": "birds"}},
        {"files": [("task", (None, b"\xff\xfe")), ("image", FILE)]},
        {"files": [(f"file{i}", FILE) for i in range(100)]},
    ],
)
def test_400_form(server: ServerProcess, form: dict[str, object]) -> None:
    check_problem(post(server, **form), 400)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=", b"empty boundary"),
        ("multipart/form-data; boundary=" + "x" * 300, b"long boundary"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a: b\r\n" * 1000 + b"\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a" * 100_000 + b": b\r\n\r\n--x--\r\n"),
        (
            "multipart/form-data; boundary=x; charset=idna",
            b'--x\r\ncontent-disposition: form-data; name="\xff"\r\n\r\n',
        ),
        (
            "multipart/form-data; boundary=x; charset=undefined",
            b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
        ),
    ],
)
def test_400_broken_form(server: ServerProcess, content_type: str, body: bytes) -> None:
    check_problem(post(server, content=body, headers={"content-type": content_type}), 400)


def test_where_an_adapter_looks(server: ServerProcess, image: bytes) -> None:
    def look(task: str, body: bytes) -> httpx.Response:
        return server.client.post(f"{server.url}/attention/{task}", content=body)

    shown = look("birds", image)
    assert shown.status_code == 200 and set(shown.json()) == {"task", "revision", "block", "most", "picture"}
    assert shown.json()["revision"] == server.predict("birds", image).json()["revision"] and shown.json()["most"] >= 1
    assert Image.open(io.BytesIO(base64.b64decode(shown.json()["picture"]))).format == "PNG"
    check_problem(look("nothing", image), 404)
    check_problem(look("birds", b"no image"), 415)
    check_problem(look("birds", b""), 400)


def test_404_unknown_task_names_no_path(server: ServerProcess, adapters: Path, image: bytes) -> None:
    for response in (server.predict("nope", image), server.get("/tasks/nope")):
        problem = check_problem(response, 404)
        assert problem["type"] == "urn:gpt-serve:problem:unknown-task"
        assert "nope" in problem["detail"] and "/" not in problem["detail"]


def test_404_and_405_of_routes_are_problems_too(server: ServerProcess) -> None:
    for path in ("/predict/", "/info", "/tasks/a/b", "/tasks/..%2f..%2fetc%2fpasswd", "/redoc", "/shutdown"):
        check_problem(server.get(path), 404)
    wrong = server.get("/predict")
    check_problem(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    check_problem(server.client.request("PATCH", server.url + "/health"), 405)
    check_problem(server.client.request("BREW", server.url + "/health"), 400)


@pytest.mark.parametrize("task", ["..", "%2e%2e", "A", "a%00b", "%20", "a" * 65, "caf%C3%A9", "%ff"])
def test_odd_names_in_the_path(server: ServerProcess, task: str) -> None:
    answer = raw(server.port, f"GET /tasks/{task} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    status = int(answer.split()[1])
    assert status in (400, 404) and b"application/problem+json" in answer


def test_413_declared_and_undeclared_length(server: ServerProcess) -> None:
    huge = b"x" * (10 * 2**20 + 1)
    headers = {"content-type": "application/json"}
    check_problem(post(server, content=huge, headers=headers), 413)
    chunks = (huge[i : i + 2**20] for i in range(0, len(huge), 2**20))
    check_problem(post(server, content=chunks, headers=headers), 413)
    check_problem(server.predict("birds", huge), 413)


def test_413_is_said_before_the_body_is_sent(server: ServerProcess) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n"
    assert raw(server.port, head).startswith(b"HTTP/1.1 413")


def test_413_too_many_pixels(server: ServerProcess) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    check_problem(server.predict("birds", bomb), 413)


def test_415_image_and_request(server: ServerProcess, image: bytes) -> None:
    check_problem(server.predict("birds", b"GIF89a" + bytes(100)), 415)
    check_problem(server.predict("birds", b"hello"), 415)
    for content_type in ("image/png", "text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        check_problem(post(server, content=image, headers={"content-type": content_type}), 415)
    check_problem(
        post(server, content=b"x", headers={"content-type": "application/json", "content-encoding": "gzip"}), 415
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_422_truncated_image(server: ServerProcess, kind: str) -> None:
    whole = encode(3, kind)
    check_problem(server.predict("birds", whole[: len(whole) // 2]), 422)


def test_bytes_that_are_not_http(server: ServerProcess) -> None:
    for junk in (b"\x00" * 100, b"GET\r\n\r\n", b"x" * 100_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000):
        answer = raw(server.port, junk)
        assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert server.get("/ready").status_code == 200


def test_tasks(server: ServerProcess, adapters: Path) -> None:
    store = AdapterStore(adapters)
    listed = {entry["task"]: entry for entry in server.get("/tasks").json()["tasks"]}
    summary = store.summary("birds")
    assert listed["birds"] == summary.to_dict()
    assert listed["birds"]["backbone"] == "mae-vit-tiny-32" and listed["birds"]["revision"] == summary.revision
    assert server.get("/tasks/birds").json() == listed["birds"] | {"labels": list(summary.labels)}


def test_probes_and_docs(server: ServerProcess) -> None:
    assert server.get("/health").json() == {"status": "alive"}
    ready = server.get("/ready").json()
    assert ready["status"] == "ready" and ready["backbone"] == "mae-vit-tiny-32"
    assert "swagger" in server.get("/docs").text
    page = server.get("/openapi.json").json()
    operation = page["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert {"200", "400", "404", "413", "415", "422", "503", "504"} <= set(operation["responses"])
    for status, response in operation["responses"].items():
        answers = ["application/json", "image/png"] if status == "200" else ["application/problem+json"]
        assert list(response["content"]) == answers


def test_metrics(server: ServerProcess, image: bytes) -> None:
    name = 'gpt_serve_requests_total{status="200",task="birds",tenant=""}'
    before, batches = server.metric(name), server.metric("gpt_serve_batch_size_count")
    taken = server.metric("gpt_serve_bank_hits_total") + server.metric("gpt_serve_bank_loads_total")
    server.predict("birds", image)
    server.predict("made-up", image)
    assert server.metric(name) == before + 1
    assert server.metric("gpt_serve_batch_size_count") == batches + 1
    assert server.metric("gpt_serve_bank_hits_total") + server.metric("gpt_serve_bank_loads_total") == taken + 1
    assert 0 < server.metric("gpt_serve_bank_used_bytes") < server.metric("gpt_serve_bank_bytes") <= 2**30
    assert "made-up" not in server.get("/metrics").text
    assert server.metric("gpt_serve_ready") == 1 and server.in_flight() == 0
