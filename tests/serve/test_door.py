"""What strangers can do to the connections and bodies of a server, from outside the process."""

import base64
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter
from tests.serve.harness import ServerProcess, check_problem, raw, serving, until

HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\n"


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def read_all(sock: socket.socket) -> bytes:
    """Everything until the server closes; a reset is an error."""
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


# Answers that come before the body


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_an_early_answer_arrives_whole(server: ServerProcess, version: bytes) -> None:
    """A socket that is closed with unread bytes sends a reset, which takes the answer with it."""
    head = HEAD.replace(b"1.1", version) + b"content-type: application/json\r\ncontent-length: 12000000\r\n\r\n"
    with connect(server) as sock:
        sock.sendall(head + bytes(12_000_000))  # all of it, before a look at the answer, as urllib does
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == 413


def test_urllib_sees_an_early_answer(server: ServerProcess) -> None:
    request = urllib.request.Request(server.url + "/predict", bytes(12_000_000), {"content-type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    with caught.value as error:
        assert error.code == 415 and error.headers["content-type"] == "application/problem+json"


@pytest.mark.slow
def test_the_rest_of_an_answered_body_is_not_read_for_ever(server: ServerProcess) -> None:
    """One connection with one-byte chunks kept the event loop busy for as long as it liked."""
    with connect(server) as sock:
        sock.sendall(HEAD + b"content-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 415")
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < began + 30:
                sock.sendall(b"1\r\nx\r\n" * 1000)
                assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 200


def test_a_body_in_crumbs_is_refused(server: ServerProcess) -> None:
    with connect(server) as sock:
        sock.sendall(HEAD + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        sock.sendall(b"1\r\n \r\n" * 5000)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400") and b"chunks" in answer and b"problem+json" in answer


# Connections


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that holds few connections, and few slots."""
    root = tmp_path_factory.mktemp("small")
    yield from serving(root, max_connections=32, stub=True)


def test_silent_connections_make_room(small: ServerProcess, image: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(small))
        assert [small.predict("good", image).status_code for _ in range(20)] == [200] * 20
    assert small.get("/ready").status_code == 200


def test_a_connection_with_a_request_in_progress_gives_no_room(small: ServerProcess, image: bytes) -> None:
    """Then a newcomer is told so, in place of a reset."""
    with ExitStack() as stack:
        for _ in range(32):
            sock = stack.enter_context(connect(small))
            sock.sendall(HEAD + b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        time.sleep(0.2)
        with connect(small) as sock:
            answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 503") and b"problem+json" in answer and b"retry-after" in answer
    until(lambda: small.predict("good", image).status_code == 200)


@pytest.mark.slow
def test_headers_must_come_in_time(server: ServerProcess) -> None:
    with connect(server) as silent, connect(server) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\n")
        for number in range(30):
            time.sleep(0.5)
            try:
                slow.sendall(b"x-%d: y\r\n" % number)
            except OSError:
                break
        else:
            pytest.fail("headers that never end are read for ever")
        with suppress(ConnectionResetError):
            assert read_all(silent) == b""


@pytest.mark.parametrize("header", [b"x: " + b"y" * 100_000, b"x: y\r\n" * 30_000], ids=["long", "many"])
def test_431(server: ServerProcess, header: bytes) -> None:
    answer = raw(server.port, b"GET /health HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431") and b"application/problem+json" in answer


def test_what_is_not_http_gets_a_problem(server: ServerProcess) -> None:
    answered = 'gpt_serve_answers_total{route="",status="400"}'
    before = server.metric(answered)
    answer = raw(server.port, b"hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400") and b"application/problem+json" in answer
    assert server.metric(answered) == before + 1


def test_many_requests_at_once_on_one_connection(server: ServerProcess) -> None:
    """A few wait for their turn; hundreds are not kept."""
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with connect(server) as sock:
        sock.sendall(request * 4 + request.replace(b"host: x", b"connection: close"))
        assert read_all(sock).count(b"HTTP/1.1 200") == 5
    assert raw(server.port, request * 5000)
    assert server.get("/health").status_code == 200


def test_head_wherever_get_is(server: ServerProcess) -> None:
    for path in ("/health", "/ready", "/tasks", "/tasks/birds", "/metrics", "/docs"):
        response = server.client.head(server.url + path)
        assert response.status_code == 200 and response.content == b"", path


# The image as the body


def test_the_image_as_the_body(server: ServerProcess, image: bytes) -> None:
    expected = server.predict("birds", image).json()
    url = server.url + "/predict/birds"
    for kind in ("image/png", "application/octet-stream", "application/x-www-form-urlencoded", ""):
        response = server.client.post(url, content=image, headers={"content-type": kind})
        assert response.status_code == 200 and response.json() == expected
    top = server.client.post(url, content=image, params={"top_k": 1}).json()
    assert top["predictions"] == expected["predictions"][:1]
    assert server.client.post(url, files={"image": ("x", image)}).json() == expected
    check_problem(server.client.post(server.url + "/predict/nope", content=image), 404)
    check_problem(server.client.post(server.url + "/predict/No", content=image), 400)
    check_problem(server.client.post(url, content=b""), 400)
    check_problem(server.client.post(url, content=b"hello"), 415)
    check_problem(server.client.post(url, files={"image": ("x", image)}, data={"task": "cars"}), 400)


def test_several_images_each_with_its_own_answer(server: ServerProcess, image: bytes) -> None:
    expected = server.predict("birds", image).json()
    files = [("image", ("a", image)), ("image", ("b", b"hello")), ("image", ("c", image))]
    response = server.client.post(server.url + "/predict", files=files, data={"task": "birds"})
    assert response.status_code == 200
    first, second, third = response.json()
    assert first == third and labels(first) == labels(expected)
    assert second["status"] == 415 and second["type"] == "urn:gpt-serve:problem:unsupported-image"
    one = server.client.post(
        server.url + "/predict", json={"task": "birds", "image": [base64.b64encode(image).decode()]}
    )
    assert [labels(answer) for answer in one.json()] == [labels(expected)]


def labels(answer: dict[str, Any]) -> list[str]:
    """In order; the probabilities differ in their last digits with the size of the batch."""
    return [entry["label"] for entry in answer["predictions"]]


# Life cycle


@pytest.mark.parametrize(
    ("key", "ends"),
    [("", 2), ("  \n", 2), ("caf\u00e9", 2), ("sesame\n", None)],
    ids=["empty", "blank", "odd", "newline"],
)
def test_keys_fail_closed(tmp_path: Path, key: str, ends: int | None) -> None:
    """A key that a deployment got wrong must not leave the server open, nor every request refused."""
    with ServerProcess(tmp_path, env={"LIT_SERVER_API_KEY": key}, stub=True) as server:
        if ends is not None:
            assert server.wait() == ends and "LIT_SERVER_API_KEY" in server.log[-1]
            return
        server.wait_ready()
        check_problem(server.get("/metrics"), 401)
        check_problem(server.client.post(server.url + "/predict"), 401)
        for headers in ({"x-api-key": "sesame"}, {"authorization": "Bearer sesame"}):
            assert server.get("/metrics", headers=headers).status_code == 200
        server.client.headers["x-api-key"] = "sesame"
        assert server.metric('gpt_serve_requests_total{status="401",task="",tenant=""}') == 1


def test_a_drain_that_fails_says_so(tmp_path: Path, image: bytes) -> None:
    """Also: the end of the terminal drains, and answers meanwhile close their connections."""
    with ServerProcess(tmp_path, stub=True, drain=1) as server:
        server.wait_ready()
        with ThreadPoolExecutor(1) as pool:
            hung = pool.submit(server.predict, "hang-a", image)
            until(lambda: server.in_flight() == 1)
            server.signal(signal.SIGHUP)
            until(lambda: server.get("/ready").status_code == 503)
            assert server.get("/health").headers["connection"] == "close"
            check_problem(hung.result(), 503)
        assert server.wait() == 1
        assert [line for line in server.log if "1 admitted image(s) could not be answered" in line]


@pytest.mark.slow
def test_a_missing_folder_is_not_an_empty_one(tmp_path: Path, spec: BackboneSpec, image: bytes) -> None:
    root = tmp_path / "adapters"
    AdapterStore(root).publish(make_adapter(spec, "good", seed=0))
    with ServerProcess(root, engine="torch") as server:
        server.wait_ready()
        assert server.predict("good", image).status_code == 200
        root.rename(tmp_path / "elsewhere")
        until(lambda: server.get("/ready").status_code == 503)
        problem = check_problem(server.predict("good", image), 503)
        assert "folder is missing" in problem["detail"] and str(tmp_path) not in problem["detail"]
        assert [line for line in server.log if "folder is missing" in line and str(root) in line]
        (tmp_path / "elsewhere").rename(root)
        until(lambda: server.get("/ready").status_code == 200)
        assert server.predict("good", image).status_code == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_all_addresses_are_all(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, host="::", stub=True) as server:
        server.wait_ready()
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{server.port}/health").status_code == 200
