"""Keys, limits, request ids, the access log and metrics by tenant, through the routes in front of a stub."""

import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gpt_serve.errors import UsageError
from gpt_serve.serve import ServeConfig, access
from gpt_serve.serve.access import AccessLog
from gpt_serve.serve.app import Door, build_app
from gpt_serve.serve.http import HTTPServer
from gpt_serve.serve.keyfile import add_key
from gpt_serve.serve.metrics import MOST_PAIRS, OTHER, Metrics
from gpt_serve.serve.runner import _is_loopback
from gpt_serve.serve.state import ServerState
from gpt_serve.specs import BackboneSpec
from tests.serve.harness import ServerProcess, check_problem, until
from tests.serve.test_app import Stub, door_to

Make = Callable[..., TestClient]


@pytest.fixture
def make(adapters: Path, spec: BackboneSpec) -> Iterator[Make]:
    """Clients of routes in front of a stub, with these options."""
    doors: list[Door] = []

    def client(**options: Any) -> TestClient:
        doors.append(door_to(Stub(), ServeConfig(adapters=adapters, **options), spec))
        return TestClient(build_app(doors[-1]))

    yield client
    for door in doors:
        door.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def predict(client: TestClient, key: str = "", task: str = "birds", **headers: str) -> Any:
    headers |= {"X-API-Key": key} if key else {}
    return client.post("/predict", data={"task": task}, files={"image": ("x", b"12345")}, headers=headers)


# Keys


def test_no_key_and_a_wrong_key_are_401(make: Make, path: Path) -> None:
    add_key(path, "acme")
    client = make(keys=path)
    for response in (predict(client), predict(client, "wrong"), client.get("/tasks"), client.get("/metrics")):
        assert check_problem(response, 401)["type"] == "urn:gpt-serve:problem:invalid-key"
        assert response.headers["www-authenticate"] == "APIKey"
    for open_path in ("/health", "/ready", "/", "/docs", "/static/page.js", "/openapi.json"):
        assert client.get(open_path).status_code == 200


def test_a_key_may_come_as_a_bearer_token(make: Make, path: Path) -> None:
    key, _ = add_key(path, "acme")
    client = make(keys=path)
    assert predict(client, key).status_code == 200
    assert predict(client, Authorization=f"Bearer {key}").status_code == 200


def test_a_key_opens_and_shows_its_tasks_only(make: Make, path: Path) -> None:
    key, _ = add_key(path, "acme", tasks=("b*",))
    client = make(keys=path)
    assert predict(client, key).status_code == 200
    for task in ("cars", "no-such-task"):  # whether a task exists is not told either
        assert "does not open the task" in check_problem(predict(client, key, task), 403)["detail"]
    headers = {"X-API-Key": key}
    assert [entry["task"] for entry in client.get("/tasks", headers=headers).json()["tasks"]] == ["birds"]
    assert client.get("/tasks/birds", headers=headers).status_code == 200
    check_problem(client.get("/tasks/cars", headers=headers), 403)
    check_problem(client.get("/metrics", headers=headers), 403)
    everything, _ = add_key(path, "all")
    assert make(keys=path).get("/metrics", headers={"X-API-Key": everything}).status_code == 200


def test_too_many_requests_are_429_and_say_when_to_return(make: Make, path: Path) -> None:
    key, _ = add_key(path, "acme", rate=0.25)
    other, _ = add_key(path, "umbrella")
    client = make(keys=path)
    assert predict(client, key).status_code == 200
    response = predict(client, key)
    assert (response.status_code, response.headers["retry-after"]) == (429, "4")
    assert response.json()["type"] == "urn:gpt-serve:problem:rate-limited"
    assert predict(client, other).status_code == 200


def test_images_in_flight_are_counted_whole(make: Make, path: Path) -> None:
    key, _ = add_key(path, "acme", in_flight=2)
    client = make(keys=path)
    for count, status in ((2, 200), (3, 400), (2, 200)):  # three can never be: to try again would not help
        response = client.post(
            "/predict", json={"task": "birds", "image": ["MTIz"] * count}, headers={"X-API-Key": key}
        )
        assert response.status_code == status


@pytest.mark.slow
def test_a_real_server_follows_the_file(adapters: Path, image: bytes, path: Path, tmp_path: Path) -> None:
    first, _ = add_key(path, "acme")
    log = tmp_path / "access.jsonl"
    with ServerProcess(adapters, engine="torch", keys=str(path), access_log=str(log)) as server:
        server.wait_ready()

        def status(key: str) -> int:
            files, headers = {"image": ("x", image)}, {"X-API-Key": key}
            return server.client.post(server.url + "/predict?task=birds", files=files, headers=headers).status_code

        assert (status(first), status("wrong")) == (200, 401)
        second, _ = add_key(path, "umbrella")
        until(lambda: status(second) == 200)
        path.write_text('{"format": "gpt-serve-keys/1", "tenants": {}}')
        until(lambda: (status(first), status(second)) == (401, 401))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    answered = [line for line in lines if line["status"] == 200 and line["path"] == "/predict"]
    assert {line["tenant"] for line in answered} == {"acme", "umbrella"}
    for line in answered:
        assert line["task"] == "birds" and re.fullmatch("[0-9a-f]{12}", line["revision"]) and line["images"] == 1
        assert sum(line["seconds"][part] for part in ("queueing", "decoding", "computing")) <= line["seconds"]["total"]
        assert line["seconds"]["computing"] > 0 and line["seconds"]["decoding"] > 0
    assert first not in log.read_text() and not [line for line in server.log if first in line]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_warning(host: str) -> None:
    assert _is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_hosts_need_one(host: str) -> None:
    assert not _is_loopback(host)


@pytest.mark.slow
def test_the_warning_is_there_when_anybody_may_ask(tmp_path: Path, path: Path) -> None:
    add_key(path, "acme")
    for options, warned in (({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "keys": str(path)}, False), ({}, False)):
        with ServerProcess(tmp_path, stub=True, backbone="refused", **options) as server:
            assert server.wait() == 2
            assert any("anybody who reaches 0.0.0.0 may ask" in line for line in server.log) is warned


def test_a_file_of_keys_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, stub=True, keys=str(tmp_path / "none.json")) as server:
        assert server.wait() == 2
        assert "does not exist: gpt-serve keys add" in server.log[-1]


# Request ids and the access log


def test_an_id_is_kept_or_made(make: Make) -> None:
    client = make()
    assert client.get("/health", headers={"X-Request-ID": "abc-123"}).headers["x-request-id"] == "abc-123"
    made = [client.get(path).headers["x-request-id"] for path in ("/health", "/no-such-path", "/")]
    assert len(set(made)) == 3 and all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
    for bad in ("x" * 129, "a b", 'a"b', ""):
        assert re.fullmatch(
            "[0-9a-f]{32}", client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        )


def test_each_request_is_a_line(make: Make, tmp_path: Path, path: Path) -> None:
    key, _ = add_key(path, "acme")
    log = tmp_path / "access.jsonl"
    client = make(keys=path, access_log=str(log))
    predict(client, key, **{"X-Request-ID": "one"})
    predict(client, key, "missing\N{SNOWMAN}".encode().decode("latin-1"))
    predict(client)
    client.get("/none?secret=1", headers={"X-API-Key": key})
    until(lambda: len(log.read_text().splitlines()) == 4)
    first, second, third, fourth = (json.loads(line) for line in log.read_text().splitlines())
    assert first | {"time": "", "seconds": "", "client": ""} == {
        "time": "",
        "request_id": "one",
        "client": "",
        "tenant": "acme",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "task": "birds",
        "revision": "0123456789ab",
        "images": 1,
        "seconds": "",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert 0 < first["seconds"]["reading"] < first["seconds"]["total"]
    assert (second["status"], second["task"], second["tenant"]) == (400, "", "acme")
    assert (third["status"], third["tenant"]) == (401, "")
    assert (fourth["status"], fourth["path"]) == (404, "/none") and "secret" not in log.read_text()


@pytest.mark.parametrize(
    "trusted, logged", [("", "127.0.0.1"), ("10.0.0.1", "127.0.0.1"), ("127.0.0.0/8", "203.0.113.7")]
)
def test_who_asks_is_what_trusted_proxies_say(
    adapters: Path, spec: BackboneSpec, tmp_path: Path, trusted: str, logged: str
) -> None:
    """Anybody can send the header; uvicorn believes all of this machine's unless it is told not to."""
    log = tmp_path / "access.jsonl"
    config = ServeConfig(adapters=adapters, access_log=str(log), trusted_proxies=trusted)
    door = door_to(Stub(), config, spec)
    server = HTTPServer(door, build_app(door), stopping=lambda: True)
    server.config.load()
    client = TestClient(server.config.loaded_app, client=("127.0.0.1", 50_000))
    assert client.get("/health", headers={"X-Forwarded-For": "203.0.113.7"}).status_code == 200
    door.close()
    assert json.loads(log.read_text())["client"] == logged


def test_a_log_may_be_rotated(tmp_path: Path) -> None:
    target = tmp_path / "access.jsonl"
    log = AccessLog(str(target))
    log.write({"number": 1})
    until(lambda: target.read_text())
    target.rename(tmp_path / "old.jsonl")
    log.write({"number": 2})
    log.close()
    assert (tmp_path / "old.jsonl").read_text() == '{"number":1}\n' and target.read_text() == '{"number":2}\n'


def test_standard_output_is_a_log_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    log = AccessLog("-")
    log.write({"number": 1})
    log.close()
    assert stream.getvalue() == '{"number":1}\n'


def test_a_log_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "gpt_serve")
    monkeypatch.setattr(access, "MOST_WAITING", 3)
    log = AccessLog(str(tmp_path / "access.jsonl"))
    hung = log._handler.handle
    go_on: list[bool] = []

    def handle(record: logging.LogRecord) -> bool:
        until(lambda: go_on)
        return hung(record)

    monkeypatch.setattr(log._handler, "handle", handle)
    began = time.monotonic()
    for number in range(100):
        log.write({"number": number})
    assert time.monotonic() - began < 5
    assert caplog.text.count("lines are dropped") == 1
    go_on.append(True)
    until(lambda: "were dropped" in caplog.text)
    log.close()
    kept = [json.loads(line)["number"] for line in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert kept[:3] == [0, 1, 2] and len(kept) <= 4


def test_a_log_that_cannot_be_written_is_said_at_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        AccessLog(str(tmp_path / "none" / "access.jsonl"))


# Metrics


def test_answers_are_counted_by_task_and_tenant(make: Make, path: Path) -> None:
    key, _ = add_key(path, "acme")
    client = make(keys=path)
    predict(client, key)
    predict(client, key, "cars")
    predict(client)
    text = client.get("/metrics", headers={"X-API-Key": key}).text
    for task, tenant, status in (("birds", "acme", 200), ("cars", "acme", 200), ("", "", 401)):
        assert f'gpt_serve_requests_total{{status="{status}",task="{task}",tenant="{tenant}"}} 1.0' in text


def test_the_number_of_series_is_bounded() -> None:
    metrics = Metrics(ServerState(8))
    for number in range(MOST_PAIRS + 500):
        metrics.answered("/predict", "acme", 200, [(f"task-{number}", 200)], 0.1)
    metrics.answered("/predict", "acme", 200, [("task-0", 200)], 0.1)
    text = metrics.text().decode()
    assert text.count("gpt_serve_requests_total{") == MOST_PAIRS + 1
    assert f'gpt_serve_requests_total{{status="200",task="{OTHER}",tenant="{OTHER}"}} 500.0' in text
    assert 'gpt_serve_requests_total{status="200",task="task-0",tenant="acme"} 2.0' in text
