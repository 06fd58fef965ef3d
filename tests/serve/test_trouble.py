"""Full queues, deadlines, bugs, hung and killed workers: nothing hangs, nobody pays for another.

On a stub, see entry.py, except where the engine matters.
"""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import encode
from tests.serve.harness import START_SECONDS, ServerProcess, check_problem, until


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
    """Of sixteen slots one task gets twelve."""
    with ThreadPoolExecutor(28) as pool:
        with stub.holding():
            futures = [pool.submit(stub.predict, "held-a", image) for _ in range(28)]
            until(lambda: sum(future.done() for future in futures) == 28 - 12)
        answers = [future.result() for future in futures]
    turned_away = [answer for answer in answers if answer.status_code != 200]
    assert len(turned_away) == 28 - 12
    for answer in turned_away:
        assert check_problem(answer, 503)["type"] == "urn:gpt-serve:problem:overloaded"
        assert answer.headers["retry-after"] == "1"
    until(lambda: stub.in_flight() == 0)
    assert stub.predict("good", image).status_code == 200


def test_a_flood_for_one_task_leaves_others_their_slots(stub: ServerProcess, image: bytes) -> None:
    with ThreadPoolExecutor(12) as pool, stub.holding():
        for _ in range(12):
            pool.submit(stub.predict, "held-a", image)
        until(lambda: stub.in_flight() == 12)
        for _ in range(6):
            refused = stub.predict("held-a", image)
            assert "12 requests for this task" in check_problem(refused, 503)["detail"]
            others = stub.predict_all([("good", image)] * 4)
            assert [answer.status_code for answer in others] == [200] * 4
    until(lambda: stub.in_flight() == 0)


def test_the_body_is_not_read_before_admission(stub: ServerProcess, image: bytes) -> None:
    """Sixteen clients that do not finish their bodies fill the queue; the slots come back."""
    finish = threading.Event()

    def unfinished() -> httpx.Response:
        def body() -> object:
            yield b"{"
            finish.wait(60)
            yield b"}"

        headers = {"content-type": "application/json"}
        return httpx.post(stub.url + "/predict", content=body(), headers=headers, timeout=60)  # type: ignore[arg-type]

    with ThreadPoolExecutor(16) as pool:
        stuck = [pool.submit(unfinished) for _ in range(16)]
        until(lambda: stub.in_flight() == 16)
        check_problem(stub.predict("good", image), 503)
        finish.set()
        for future in stuck:
            check_problem(future.result(), 400)
    assert stub.in_flight() == 0


def test_clients_that_leave_give_their_slots_back(stub: ServerProcess, image: bytes) -> None:
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
            assert server.in_flight() == 1, "the slot is held until the worker is done"
            until(lambda: server.metric("gpt_serve_worker_restarts") == 1)
            assert server.in_flight() == 0
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
