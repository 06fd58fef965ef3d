"""Several tasks of an image, and of several images: each with its own answer, counted as what it is."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from gpt_serve.errors import InvalidAdapter, UndecodableImage, UnknownTask
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.app import Door, build_app
from gpt_serve.serve.desk import LocalDesk
from gpt_serve.serve.keyfile import add_key
from gpt_serve.serve.messages import Answer, Item
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.state import ServerState
from gpt_serve.specs import BackboneSpec
from tests.serve.harness import check_problem, until

REVISIONS = {"birds": "aaaaaaaaaaaa", "cars": "bbbbbbbbbbbb"}
Make = Callable[..., TestClient]


class Stub:
    """Knows two tasks, of which ``broken`` is a third; never answers ``slow``."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        self.items.append(item)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if item.image == b"bad":
            future.set_exception(UndecodableImage("damaged"))
        elif item.task == "broken":
            future.set_exception(InvalidAdapter("the file of 'broken' is damaged"))
        elif item.task in REVISIONS:
            content = {"task": item.task, "image": item.image.decode()}
            future.set_result(Answer(item.task, REVISIONS[item.task], json.dumps(content).encode()))
        elif item.task != "slow":
            future.set_exception(UnknownTask(f"no task {item.task!r}"))
        return future


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def make(stub: Stub, adapters: Path, spec: BackboneSpec) -> Iterator[Make]:
    """Clients of routes in front of the stub, with these options."""
    doors: list[Door] = []

    def client(**options: Any) -> TestClient:
        config = ServeConfig(**{"adapters": adapters, "queue_limit": 16} | options)
        state = ServerState(config.queue_limit, phase="ready", spec=spec)
        doors.append(Door(config, LocalDesk(config, stub, state, Metrics(state))))
        return TestClient(build_app(doors[-1]))

    yield client
    for door in doors:
        assert door.desk.state.admitted == 0
        door.close()


def ask(client: TestClient, *tasks: str, images: tuple[bytes, ...] = (b"1",), **options: Any) -> httpx.Response:
    """By a form with these tasks and images."""
    files = [("image", ("x", image)) for image in images]
    response: httpx.Response = client.post("/predict", data={"task": list(tasks)}, files=files, **options)
    return response


def told(element: dict[str, Any]) -> tuple[str, Any]:
    """The task, and the image that it answered or the status of its problem."""
    return element["task"], element.get("image", element.get("status"))


def test_each_task_has_its_own_answer_or_problem(make: Make) -> None:
    response = ask(make(), "cars", "nobody", "broken", "birds")
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert [told(element) for element in response.json()] == [
        ("cars", "1"),
        ("nobody", 404),
        ("broken", 503),
        ("birds", "1"),
    ]
    problem = response.json()[1]
    assert problem == {
        "type": "urn:gpt-serve:problem:unknown-task",
        "title": "Unknown task",
        "status": 404,
        "detail": "no task 'nobody'",
        "task": "nobody",
    }


def test_a_list_for_each_image(make: Make) -> None:
    lists = ask(make(), "cars", "birds", images=(b"1", b"bad", b"2")).json()
    assert [[told(element) for element in one] for one in lists] == [
        [("cars", "1"), ("birds", "1")],
        [("cars", 422), ("birds", 422)],
        [("cars", "2"), ("birds", "2")],
    ]


def test_one_task_of_several_images_is_one_list(make: Make) -> None:
    elements = ask(make(), "cars", images=(b"1", b"bad")).json()
    assert told(elements[0]) == ("cars", "1") and elements[1]["status"] == 422
    listed = make().post("/predict", json={"task": ["cars"], "image": "MQ=="}).json()
    assert [told(element) for element in listed] == [("cars", "1")]


def test_all_tasks_are_those_that_the_key_opens(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    every, some, none = (add_key(path, name, tasks=(of,))[0] for name, of in (("a", "*"), ("b", "c*"), ("c", "x")))
    client = make(keys=path)
    for key, wanted in ((every, ["birds", "cars"]), (some, ["cars"]), (none, [])):
        response = client.post("/predict?tasks=*", files={"image": ("x", b"1")}, headers={"X-API-Key": key})
        assert response.status_code == 200
        assert [told(element) for element in response.json()] == [(task, "1") for task in wanted]


def test_a_task_that_the_key_does_not_open_harms_no_other(make: Make, stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, _ = add_key(path, "acme", tasks=("birds",))
    response = ask(make(keys=path), "cars", "birds", "nobody", headers={"X-API-Key": key})
    assert [told(element) for element in response.json()] == [("cars", 403), ("birds", "1"), ("nobody", 403)]
    assert [item.task for item in stub.items] == ["birds"]


def test_a_late_task_is_late_alone(make: Make) -> None:
    client = make(deadline=0.3)
    assert [told(element) for element in ask(client, "slow", "birds").json()] == [("slow", 504), ("birds", "1")]
    check_problem(ask(client, "slow"), 504)


def test_more_answers_than_the_server_takes_on_are_refused_at_once(make: Make, stub: Stub) -> None:
    client = make(queue_limit=6)
    names = [f"t{number}" for number in range(7)]
    for response in (ask(client, *names), ask(client, *names[:3], images=(b"1", b"2", b"3"))):
        assert "takes on 6 at once: ask for fewer" in check_problem(response, 413)["detail"]
    assert not stub.items
    assert ask(client, "birds", "cars", images=(b"1", b"2", b"3")).status_code == 200


def test_limits_count_answers(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for four answers uses up what four requests would."""
    monkeypatch.setattr("gpt_serve.serve.tenants.time.monotonic", lambda: 1000.0)
    path = tmp_path / "keys.json"
    key, _ = add_key(path, "acme", rate=2.0, in_flight=4)
    client, headers = make(keys=path), {"X-API-Key": key}
    problem = check_problem(ask(client, "a", "b", "c", "d", "e", headers=headers), 400)
    assert "asks for 5 answers, and this key has 4 at once" in problem["detail"]
    assert ask(client, "a", "b", "c", "birds", headers=headers).status_code == 200
    refused = ask(client, "birds", headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2"), "three are owed"


def test_the_log_and_the_metrics_count_answers(make: Make, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    client = make(access_log=str(log))
    ask(client, "birds", "nobody", "cars")
    ask(client, "birds", images=(b"1", b"bad"))
    until(lambda: len(log.read_text().splitlines()) == 2)
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert (first["task"], first["revision"], first["images"]) == ("", "", 1)
    assert first["answers"] == [
        {"task": "birds", "revision": REVISIONS["birds"], "status": 200},
        {"task": "", "revision": "", "status": 404},
        {"task": "cars", "revision": REVISIONS["cars"], "status": 200},
    ]
    assert (second["task"], second["revision"], second["images"]) == ("birds", REVISIONS["birds"], 2)
    assert [answer["status"] for answer in second["answers"]] == [200, 422]
    text = client.get("/metrics").text
    for task, status, count in (("birds", 200, 2), ("birds", 422, 1), ("cars", 200, 1), ("", 404, 1)):
        assert f'gpt_serve_requests_total{{status="{status}",task="{task}",tenant=""}} {count}.0' in text
