"""The Python client, both forms of it: against a server that says what it is told to, and against the real one."""

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpt_serve import errors
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.client import Answer, AsyncClient, ClassShare, Client, Label, Retries, Segmentation
from gpt_serve.model.backbone import Backbone
from gpt_serve.serve.problems import STATUS, problem_of
from gpt_serve.train.data.datasets import open_dataset
from tests.factories import make_adapter
from tests.serve.harness import ServerProcess, serving

ANSWER = {"task": "birds", "revision": "0123456789ab", "predictions": [{"label": "wren", "probability": 0.75}]}


class Waited:
    """`AsyncClient` with methods that wait, so that each test runs with both."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.client = AsyncClient(*args, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self.runner.run(getattr(self.client, name)(*args, **options))

    def __enter__(self) -> "Waited":
        self.runner.run(self.client.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self.runner.run(self.client.__aexit__(*error))
        self.runner.close()


@pytest.fixture(params=[Client, Waited], ids=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@dataclass
class Scripted:
    """A server that gives these answers in turn, the last one for ever, and keeps what it was asked.

    An answer is (status, headers, body); a status of 0 hangs up.
    """

    url: str = ""
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def say(self, *answers: tuple[int, dict[str, str], Any]) -> None:
        self.answers = [
            (status, headers, body if isinstance(body, bytes) else json.dumps(body).encode())
            for status, headers, body in answers
        ]


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            script.asked.append((self.command, self.path, headers, body))
            status, more, content = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if not status:
                return
            self.send_response(status)
            for name, value in {**more, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # seconds until it sees that it shall end
        thread.start()
        yield script
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clients would have waited."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("gpt_serve.client.clients.time.sleep", found.append)
    monkeypatch.setattr("gpt_serve.client.clients.asyncio.sleep", sleep)
    return found


# Questions and answers


def test_an_answer_has_all_that_was_said(make: Any, scripted: Scripted) -> None:
    said = ANSWER | {"known": 0.02, "unknown": True}
    scripted.say((200, {}, said))
    with make(scripted.url) as client:
        answer = client.predict("birds", b"image")
    assert answer == Answer("birds", "0123456789ab", (Label("wren", 0.75),), said, 0.02, True)
    assert answer.best == Label("wren", 0.75) and (answer.known, answer.unknown) == (0.02, True)


def test_the_question_is_a_form(make: Any, scripted: Scripted, tmp_path: Path) -> None:
    scripted.say((200, {}, ANSWER))
    (tmp_path / "image.png").write_bytes(b"from a file")
    with make(scripted.url + "/below/", key="secret") as client:
        client.predict("birds", tmp_path / "image.png", top_k=2)
        client.predict("birds", str(tmp_path / "image.png"))
    (_, path, headers, body), (_, _, _, other) = scripted.asked
    assert (path, headers["x-api-key"]) == ("/below/predict", "secret")
    assert b"from a file" in body and b'name="top_k"\r\n\r\n2\r\n' in body and b'name="task"\r\n\r\nbirds\r\n' in body
    assert b"from a file" in other and b"top_k" not in other


def test_several_images_get_an_answer_or_an_error_each(make: Any, scripted: Scripted, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"from a file")
    problem = {"type": "urn:gpt-serve:problem:undecodable-image", "title": "", "status": 422, "detail": "damaged"}
    scripted.say((200, {}, [ANSWER, problem, ANSWER]))
    with make(scripted.url) as client:
        first, second, third = client.predict_batch("birds", [b"1", tmp_path / "image.png", b"3"], top_k=2)
        assert first == third == Answer("birds", "0123456789ab", (Label("wren", 0.75),), ANSWER)
        assert isinstance(second, errors.UndecodableImage) and str(second) == "damaged"
        with pytest.raises(errors.ServerError, match="does not answer as GPT-Serve does"):
            client.predict_batch("birds", [b"1"])
        for nothing in ([], b"image", "image.png"):
            with pytest.raises(errors.UsageError, match="a list of one image or more"):
                client.predict_batch("birds", nothing)
    asked = json.loads(scripted.asked[0][3])
    assert (asked["task"], asked["top_k"]) == ("birds", 2)
    assert [base64.b64decode(image) for image in asked["image"]] == [b"1", b"from a file", b"3"]


def test_the_key_may_come_from_the_environment(make: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted.say((200, {}, {"status": "ready"}))
    monkeypatch.setenv("GPT_SERVE_KEY", "from-outside")
    for key in (None, "own", ""):
        with make(scripted.url, key=key) as client:
            client.ready()
    assert [headers.get("x-api-key") for _, _, headers, _ in scripted.asked] == ["from-outside", "own", None]


def test_a_name_stays_one_part_of_the_path(make: Any, scripted: Scripted) -> None:
    scripted.say((200, {}, {}))
    with make(scripted.url) as client:
        client.task("../metrics?x")
    assert scripted.asked[0][1] == "/tasks/..%2Fmetrics%3Fx"


def test_several_tasks_answer_by_name(make: Any, scripted: Scripted) -> None:
    other = {"type": "urn:gpt-serve:problem:unknown-task", "status": 404, "detail": "no such", "task": "nobody"}
    scripted.say((200, {}, [ANSWER, other]))
    with make(scripted.url) as client:
        told = client.predict_tasks(b"1", ["birds", "nobody"], top_k=2)
        client.predict_tasks(b"1")
        with pytest.raises(errors.UsageError, match="a list of one task or more"):
            client.predict_tasks(b"1", "birds")
        with pytest.raises(errors.UsageError, match="a list of one task or more"):
            client.predict_tasks(b"1", [])
        scripted.say((200, {}, ANSWER))
        with pytest.raises(errors.ServerError, match="does not answer as GPT-Serve does"):
            client.predict_tasks(b"1")
    assert told["birds"] == Answer("birds", "0123456789ab", (Label("wren", 0.75),), ANSWER)
    assert type(told["nobody"]) is errors.UnknownTask and str(told["nobody"]) == "no such"
    asked = [json.loads(body) for *_, body in scripted.asked[:2]]
    assert asked == [{"task": ["birds", "nobody"], "top_k": 2, "image": "MQ=="}, {"tasks": "*", "image": "MQ=="}]


def test_a_mask_has_its_type(make: Any, scripted: Scripted) -> None:
    classes = [{"id": 0, "label": "road", "share": 0.25}, {"id": 1, "label": "sky", "share": 0.75}]
    said = {"task": "roads", "revision": "0123456789ab", "kind": "segmentation", "width": 7, "height": 5}
    said |= {"classes": classes, "mask": "UE5H"}
    scripted.say((200, {}, said))
    with make(scripted.url) as client:
        answer = client.predict("roads", b"image")
        assert answer.predictions == () and answer.content == said
        shares = (ClassShare(0, "road", 0.25), ClassShare(1, "sky", 0.75))
        assert answer.segmentation == Segmentation(7, 5, shares, b"PNG")
        scripted.say((200, {}, said | {"mask": "!"}))
        with pytest.raises(errors.ServerError, match="does not answer as GPT-Serve does"):
            client.predict("roads", b"image")


# Errors


@pytest.mark.parametrize("kind", [kind for kind, (status, _) in STATUS.items() if status != 500])
def test_a_problem_is_raised_as_the_error_that_it_was(
    make: Any, scripted: Scripted, kind: type[errors.GPTServeError]
) -> None:
    problem = problem_of(kind("what to do"))
    scripted.say((problem.status_code, {"Content-Type": problem.media_type}, bytes(problem.body)))
    with make(scripted.url, retries=Retries(attempts=1)) as client, pytest.raises(kind) as caught:
        client.predict("birds", b"image")
    assert type(caught.value) is kind and str(caught.value) == "what to do"


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (401, {"type": "about:blank", "detail": "a key, please"}, errors.InvalidKey, "a key, please"),
        (405, {"type": "about:blank", "detail": "not so"}, errors.InvalidRequest, "not so"),
        (500, {"type": "about:blank", "detail": "its log says why"}, errors.ServerError, "its log says why"),
        (404, b"<html>no such page</html>", errors.ServerError, "/predict answered 404 Not Found"),
        (502, b"[]", errors.ServerError, "/predict answered 502 Bad Gateway"),
        (302, b"", errors.ServerError, "/predict answered 302 Found"),
        (200, b"<html>a proxy's log-in</html>", errors.ServerError, "does not answer as GPT-Serve does"),
        (200, {"task": "birds"}, errors.ServerError, "does not answer as GPT-Serve does"),
        (200, [1], errors.ServerError, "does not answer as GPT-Serve does"),
    ],
)
def test_what_is_no_answer_is_an_error_of_one_line(
    make: Any, scripted: Scripted, status: int, body: Any, kind: type[Exception], says: str
) -> None:
    scripted.say((status, {}, body))
    with make(scripted.url, retries=Retries(attempts=1)) as client, pytest.raises(kind) as caught:
        client.predict("birds", b"image")
    assert type(caught.value) is kind and says in str(caught.value) and "\n" not in str(caught.value)


def test_no_server_at_all(make: Any, pauses: list[float]) -> None:
    with (
        make("http://127.0.0.1:1") as client,
        pytest.raises(errors.ServerError, match=r"no answer from http://127\.0\.0\.1:1"),
    ):
        client.ready()
    assert len(pauses) == Retries().attempts - 1


def test_a_client_says_at_once_what_cannot_work(make: Any, scripted: Scripted, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="'localhost:8000' is not the address of a server"):
        make("localhost:8000")
    with make(scripted.url) as client, pytest.raises(errors.UsageError, match="none.png cannot be read: No such file"):
        client.predict("birds", tmp_path / "none.png")


# Trying again


@pytest.mark.parametrize("first", [(429, {"Retry-After": "2"}, {}), (503, {"Retry-After": "2"}, {}), (502, {}, b"")])
def test_what_was_turned_away_for_now_is_sent_again(
    make: Any, scripted: Scripted, pauses: list[float], first: tuple[int, dict[str, str], Any]
) -> None:
    scripted.say(first, first, (200, {}, ANSWER))
    with make(scripted.url) as client:
        assert client.predict("birds", b"image").task == "birds"
    bodies = [body.replace(body.split(b"\r\n")[0], b"boundary") for *_, body in scripted.asked]
    assert len(bodies) == 3 and bodies[0] == bodies[1] == bodies[2]
    assert pauses == [2.0, 2.0] or (0.125 <= pauses[0] <= 0.375 and 0.25 <= pauses[1] <= 0.75)


def test_a_connection_that_breaks_is_tried_again(make: Any, scripted: Scripted, pauses: list[float]) -> None:
    scripted.say((0, {}, b""), (200, {}, ANSWER))
    with make(scripted.url) as client:
        assert client.predict("birds", b"image").task == "birds"
    assert len(scripted.asked) == 2 and len(pauses) == 1


def test_a_date_says_when_to_try_again(make: Any, scripted: Scripted, pauses: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=8), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    scripted.say((503, {"Retry-After": soon}, {}), (503, {"Retry-After": past}, {}), (200, {}, ANSWER))
    with make(scripted.url) as client:
        client.predict("birds", b"image")
    assert 0 < pauses[0] <= 8 and pauses[1] == 0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422, 500, 504])
def test_what_would_be_refused_again_is_not_sent_again(
    make: Any, scripted: Scripted, pauses: list[float], status: int
) -> None:
    scripted.say((status, {"Retry-After": "1"}, {"type": "about:blank", "detail": "no"}))
    with make(scripted.url) as client, pytest.raises(errors.GPTServeError):
        client.predict("birds", b"image")
    assert len(scripted.asked) == 1 and pauses == []


def test_patience_ends(make: Any, scripted: Scripted, pauses: list[float]) -> None:
    busy = problem_of(errors.Overloaded("later"))
    scripted.say((503, {"Retry-After": "4"}, bytes(busy.body)))
    with make(scripted.url, retries=Retries(attempts=10, patience=9)) as client, pytest.raises(errors.Overloaded):
        client.predict("birds", b"image")
    assert pauses == [4.0, 4.0]
    with make(scripted.url, retries=Retries(attempts=2, patience=9)) as client, pytest.raises(errors.Overloaded):
        client.predict("birds", b"image")
    assert pauses == [4.0] * 3


# The real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bundled: Backbone) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("adapters")
    AdapterStore(root).publish(make_adapter(bundled.spec, "birds", seed=0))
    yield from serving(root, engine="torch", api_key="secret")


@pytest.mark.slow
def test_the_real_server_answers(make: Any, server: ServerProcess) -> None:
    image = open_dataset("digits", 0).test[0].read()
    with make(server.url, key="secret") as client:
        assert client.ready()["backbone"] == "mae-vit-tiny-32"
        (entry,) = client.tasks()
        answer = client.predict("birds", image, top_k=1)
        assert (answer.task, answer.revision) == ("birds", entry["revision"])
        assert answer.best.label in client.task("birds")["labels"] and len(answer.predictions) == 1
        with pytest.raises(errors.UnknownTask):
            client.predict("cars", image)
        with pytest.raises(errors.UnsupportedImage):
            client.predict("birds", b"no image")
        assert client.predict_batch("birds", [image], top_k=1)[0].best == answer.best
        kinds = [type(one) for one in client.predict_batch("birds", [b"no image", image])]
        assert kinds == [errors.UnsupportedImage, Answer]
    with make(server.url, key="wrong") as client, pytest.raises(errors.InvalidKey):
        client.tasks()


@pytest.mark.slow
def test_one_client_serves_many_threads_or_coroutines(server: ServerProcess) -> None:
    images = [open_dataset("digits", 0).test[number].read() for number in range(12)]

    async def all_at_once() -> list[Answer]:
        async with AsyncClient(server.url, key="secret") as client:
            return await asyncio.gather(*(client.predict("birds", image) for image in images))

    answers: dict[int, Answer] = {}
    with Client(server.url, key="secret") as client:
        threads = [
            threading.Thread(target=lambda at=at: answers.setdefault(at, client.predict("birds", images[at])))
            for at in range(len(images))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for at, answer in enumerate(asyncio.run(all_at_once())):
        assert answer.best.label == answers[at].best.label


def test_the_client_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'fastapi', 'litserve'}"
    check = f"import sys, gpt_serve.client; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_without_httpx_it_says_how_to_get_it() -> None:
    program = "import sys; sys.modules['httpx'] = None; import gpt_serve.client"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "gpt_serve.client needs httpx: pip install 'gpt-serve[client]'" in run.stderr
