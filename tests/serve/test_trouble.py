"""Full queues, deadlines, bugs, hung and killed workers: nothing hangs, nobody pays for another.

On a stub, see entry.py, except where the engine matters.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter
from tests.serve.conftest import encode
from tests.serve.harness import START_SECONDS, ServerProcess, check_problem, serving, until


def test_one_bad_image_among_others(server: ServerProcess) -> None:
    """Requests that arrive while the worker is stopped reach the engine together."""
    good = [encode(i) for i in range(7)]
    alone = [server.predict("birds", image).json() for image in good]
    passes = server.metric("gpt_serve_batch_size_count")
    requests = [("birds", image) for image in good]
    requests.insert(3, ("birds", b"\xff\xd8\xff not a picture"))
    with ThreadPoolExecutor(8) as pool:
        with server.stopped():
            futures = [pool.submit(server.predict, *request) for request in requests]
            until(lambda: server.in_flight() == 8)
        answers = [future.result() for future in futures]
    check_problem(answers.pop(3), 422)
    assert [answer.status_code for answer in answers] == [200] * 7
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.json()["revision"] == expected["revision"]
        for entry, other in zip(answer.json()["predictions"], expected["predictions"], strict=True):
            assert entry["label"] == other["label"]
            assert entry["probability"] == pytest.approx(other["probability"], abs=1e-4)
    assert server.metric("gpt_serve_batch_size_count") - passes < 7, "none shared a pass"


def test_a_bug_in_the_engine_hits_only_its_own_request(stub: ServerProcess, image: bytes) -> None:
    answers = stub.predict_all([("good", image), ("bug-a", image), ("good", image)])
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    problem = check_problem(answers[1], 500)
    assert "RuntimeError" not in problem["detail"]


def test_503_at_the_limit(stub: ServerProcess, image: bytes) -> None:
    """There are sixteen slots."""
    with ThreadPoolExecutor(28) as pool:
        with stub.holding():
            futures = [pool.submit(stub.predict, "held-a", image) for _ in range(28)]
            until(lambda: sum(future.done() for future in futures) == 28 - 16)
        answers = [future.result() for future in futures]
    turned_away = [answer for answer in answers if answer.status_code != 200]
    assert len(turned_away) == 28 - 16
    for answer in turned_away:
        problem = check_problem(answer, 503)
        assert problem["type"] == "urn:gpt-serve:problem:overloaded" and problem["detail"].startswith("16 images")
        assert int(answer.headers["retry-after"]) >= 1
    until(lambda: stub.in_flight() == 0)
    assert stub.predict("good", image).status_code == 200


def test_a_flood_for_two_tasks_leaves_a_third_its_slots(stub: ServerProcess, image: bytes) -> None:
    """Shares that are fixed would not do: two tasks with three quarters each are enough to fill all slots."""
    with ThreadPoolExecutor(32) as pool:
        with stub.holding():
            floods = [pool.submit(stub.predict, f"held-{number % 2}", image) for number in range(32)]
            until(lambda: sum(flood.done() for flood in floods) >= 16 and stub.in_flight() == 16)
            others = stub.predict_all([("good", image)] * 4)
            assert [answer.status_code for answer in others] == [200] * 4
        refused = [flood.result().json()["detail"] for flood in floods if flood.result().status_code == 503]
    details = {detail.partition(": try again in ")[0] for detail in refused}
    assert details == {
        "16 images are already waiting",
        "the place in the queue went to somebody with fewer images waiting",
    }
    until(lambda: stub.in_flight() == 0)


@pytest.mark.slow
def test_bodies_that_do_not_come_hold_no_slots(stub: ServerProcess, image: bytes) -> None:
    """A slot for the price of a header would let a few slow senders turn all others away."""
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", stub.port))) for _ in range(64)]
        for sock in slow:
            sock.sendall(head)
        assert stub.in_flight() == 0
        assert [stub.predict("good", image).status_code for _ in range(5)] == [200] * 5
        for sock in slow:
            sock.settimeout(30)
            answer = sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408") and b"problem+json" in answer and b"connection: close" in answer


def test_clients_that_leave_give_their_slots_back(stub: ServerProcess, image: bytes) -> None:
    """At once, not when the engine comes to them."""

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                stub.url + "/predict",
                data={"task": "held-a"},
                files={"image": ("x", image)},
                timeout=httpx.Timeout(60, read=0.1),
            )

    with stub.holding(), ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(leave) for _ in range(8)]:
            future.result()
        until(lambda: stub.in_flight() == 0)
        assert stub.predict("good", image).status_code == 200
    assert stub.metric('gpt_serve_requests_total{status="499",task="",tenant=""}') >= 8


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory, spec: BackboneSpec) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("troubled")
    for task in ("good", "heavy-a", "stuck-a"):
        AdapterStore(root).publish(make_adapter(spec, task, seed=0))
    yield from serving(root, trouble=True, engine="torch", deadline=3, queue_limit=16, max_batch_size=8)


@pytest.mark.slow
def test_a_slow_adapter_is_no_hung_worker(troubled: ServerProcess, image: bytes) -> None:
    """Each of its images takes half a second, more clients ask than it can answer in time, and others are served."""
    with ThreadPoolExecutor(12) as pool:
        flood = [pool.submit(troubled.predict, "heavy-a", image) for _ in range(36)]
        others = []
        for _ in range(8):
            time.sleep(0.7)
            others.append(troubled.predict("good", image).status_code)
        assert {future.result().status_code for future in flood} <= {200, 503, 504}
    assert others == [200] * 8
    assert troubled.metric("gpt_serve_worker_restarts") == 0


@pytest.mark.slow
def test_a_file_that_never_answers_stops_its_own_task_only(troubled: ServerProcess, image: bytes) -> None:
    with ThreadPoolExecutor(4) as pool:
        stuck = [pool.submit(troubled.predict, "stuck-a", image) for _ in range(4)]
        until(lambda: troubled.in_flight() == 4)
        assert [troubled.predict("good", image).status_code for _ in range(3)] == [200] * 3
        assert troubled.get("/health").status_code == 200
        for future in stuck:
            check_problem(future.result(), 504)


@pytest.mark.slow
def test_a_hung_worker_gives_504_and_is_replaced(tmp_path: Path, image: bytes) -> None:
    """The deadline is 2 s, and a worker that is silent for twice that is killed."""
    with ServerProcess(tmp_path, stub=True, deadline=2) as server:
        server.wait_ready()
        started = time.monotonic()
        with server.holding("hold-start"):
            answers = server.predict_all([("hang-a", image), ("good", image), ("good", image)])
            assert time.monotonic() - started > 1.9
            assert [answer.status_code for answer in answers] == [504, 200, 200]
            check_problem(answers[0], 504)
            until(lambda: server.metric("gpt_serve_worker_restarts") == 1)
            check_problem(server.predict("good", image), 503)
        until(lambda: server.get("/ready").status_code == 200, START_SECONDS)
        assert server.predict("good", image).status_code == 200


@pytest.mark.slow
def test_a_killed_worker_is_noticed_and_replaced(server: ServerProcess, image: bytes) -> None:
    old, restarts = server.worker_pid(), server.metric("gpt_serve_worker_restarts")
    with ThreadPoolExecutor(1) as pool, server.stopped():
        waiting = pool.submit(server.predict, "birds", image)
        until(lambda: server.in_flight() == 1)
        time.sleep(0.1)  # its body was read by now
        os.kill(old, signal.SIGKILL)
        assert "died" in check_problem(waiting.result(), 503)["detail"]
    not_ready = check_problem(server.get("/ready"), 503)
    assert not_ready["type"] == "urn:gpt-serve:problem:not-ready"
    assert server.get("/health").status_code == server.get("/tasks").status_code == 200
    check_problem(server.predict("birds", image), 503)
    until(lambda: server.get("/ready").status_code == 200, START_SECONDS)
    assert server.worker_pid() != old and server.metric("gpt_serve_worker_restarts") == restarts + 1
    assert len([line for line in server.log if "building the ONNX graph" in line]) <= 1, "it was kept"
    assert server.predict("birds", image).status_code == 200
