"""Strangers: a thousand hostile requests and a store full of hostile adapters."""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_serve.specs import BackboneSpec
from tests.hostile_adapters import Hostile, hostile_adapters
from tests.hostile_images import hostile_images
from tests.serve.harness import ServerProcess, check_problem

pytestmark = pytest.mark.slow


def json_body(**fields: object) -> dict[str, object]:
    return {"content": json.dumps(fields), "headers": {"content-type": "application/json"}}


def form(task: str, image: bytes, **data: str) -> dict[str, object]:
    return {"data": {"task": task} | data, "files": {"image": ("x", image)}}


ODD_TASKS = (
    "../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "A", "", " ", "birds ", "a" * 65, "a\nb", "a\x00b", "-a", "_a",
    "caf\u00e9", "\u202ebirds", "%2e%2e%2fx", "${HOME}", "birds/../birds", "con:", "\U0001f600",
    "adapter.safetensors",
)  # fmt: skip


def hostile_bodies(image: bytes, count: int, rng: random.Random) -> list[dict[str, object]]:
    """Requests that are wrong outside the image: names, fields, types, truncated and random bodies."""
    boundary = "multipart/form-data; boundary=b"
    part = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n'
    whole = b"--b\r\n" + part.format("task", "").encode() + b"birds\r\n--b\r\n"
    whole += part.format("image", '; filename="x"').encode() + image + b"\r\n--b--\r\n"
    fields: list[object] = [None, True, 0, -1, 1e308, "", [], {}, [[]], "x" * 5000, "\ud800", {"a": {"b": 1}}]

    def odd_task() -> dict[str, object]:
        task = rng.choice(ODD_TASKS)
        return rng.choice([form(task, image), json_body(task=task, image="aGk=")])

    def odd_field() -> dict[str, object]:
        name = rng.choice(["task", "image", "top_k", "other"])
        return json_body(**({"task": "birds", "image": "!"} | {name: rng.choice(fields)}))

    def random_bytes() -> dict[str, object]:
        kind = rng.choice(["application/json", boundary, "multipart/form-data", "text/html", "image/png", ""])
        return {"content": rng.randbytes(rng.randrange(3000)), "headers": {"content-type": kind}}

    def truncated_form() -> dict[str, object]:
        return {"content": whole[: rng.randrange(len(whole) - 10)], "headers": {"content-type": boundary}}

    def deep_json() -> dict[str, object]:
        body = rng.choice([b"[", b'{"task":', b'["a",']) * rng.randrange(1, 50_000)
        return {"content": body, "headers": {"content-type": "application/json"}}

    def ten_megabytes() -> dict[str, object]:
        return rng.choice([form("birds", bytes(10 * 2**20)), json_body(task="birds", image="A" * (10 * 2**20))])

    makers = [odd_task, odd_field, random_bytes, truncated_form, deep_json]
    return [rng.choice(makers)() for _ in range(count - 6)] + [ten_megabytes() for _ in range(6)]


def test_a_thousand_hostile_requests(server: ServerProcess, image: bytes) -> None:
    """Each gets a 4xx problem; the worker is the same process throughout, and honest clients are answered meanwhile."""
    rng = random.Random(1)
    requests = [form("birds", case.data) for case in hostile_images(500, seed=1)]
    requests += hostile_bodies(image, 500, rng)
    rng.shuffle(requests)
    worker, restarts, logged = server.worker_pid(), server.metric("gpt_serve_worker_restarts"), len(server.log)
    expected = server.predict("birds", image).json()
    statuses: Counter[int] = Counter()
    for number, request in enumerate(requests):
        response = server.client.post(server.url + "/predict", **request)  # type: ignore[arg-type]
        assert 400 <= response.status_code < 500, (number, request, response.text)
        check_problem(response, response.status_code)
        statuses[response.status_code] += 1
        if number % 20 == 0:
            answer = server.predict("birds", image)
            assert answer.status_code == 200 and answer.json() == expected
    assert sum(statuses.values()) == 1000 and {400, 413, 415, 422} <= set(statuses)
    assert server.worker_pid() == worker and server.metric("gpt_serve_worker_restarts") == restarts
    assert server.in_flight() == 0
    assert not [line for line in server.log[logged:] if "Traceback" in line or "ERROR" in line]


@pytest.fixture
def hostile(adapters: Path, spec: BackboneSpec) -> Iterator[list[Hostile]]:
    """Hostile adapters beside the good ones, for one test."""
    cases = hostile_adapters(spec)
    for case in cases:
        case.put(adapters)
    yield cases
    for case in cases:
        shutil.rmtree(adapters / case.name)


def test_hostile_adapters_are_refused_and_the_others_served(
    server: ServerProcess, adapters: Path, image: bytes, hostile: list[Hostile]
) -> None:
    assert len(hostile) >= 20
    worker, restarts, logged = server.worker_pid(), server.metric("gpt_serve_worker_restarts"), len(server.log)
    expected = server.predict("birds", image).json()
    listed = {entry["task"]: entry for entry in server.get("/tasks").json()["tasks"]}
    for case in hostile:
        assert set(listed[case.name]) == {"task", "error"}
        for response in (server.predict(case.name, image), server.get(f"/tasks/{case.name}")):
            problem = check_problem(response, 503)
            assert problem["title"] == "Adapter refused"
            assert re.search(case.message, problem["detail"]) and str(adapters) not in problem["detail"]
            assert problem["detail"] == listed[case.name]["error"]
        assert server.predict("birds", image).json() == expected
    assert "error" not in listed["birds"]
    assert server.worker_pid() == worker and server.metric("gpt_serve_worker_restarts") == restarts
    assert not [line for line in server.log[logged:] if "Traceback" in line or "ERROR" in line]
