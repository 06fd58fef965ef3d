"""Full batches, full queues, deadlines, bugs, hung and killed workers: nothing hangs, nobody pays for another."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.conftest import encode
from tests.serve.harness import ServerProcess, check_problem, until

pytestmark = pytest.mark.slow


def test_one_bad_image_in_a_full_batch(troubled: ServerProcess) -> None:
    """Requests that pile up behind a slow batch go through together: 8 is the limit here."""
    good = [encode(i) for i in range(7)]
    alone = [troubled.predict("good", image).json() for image in good]
    full = 'gpt_serve_batch_size_bucket{le="4.0"}'
    small, batches = troubled.metric(full), troubled.metric("gpt_serve_batch_size_count")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(troubled.predict, "sleepy-a", good[0])
        until(lambda: troubled.in_flight() == 1)
        time.sleep(0.05)  # the worker has taken it by now
        requests = [("good", image) for image in good]
        requests.insert(3, ("good", b"\xff\xd8\xff not a picture"))
        answers = troubled.predict_all(requests)
        assert slow.result().status_code == 200
    bad = answers.pop(3)
    check_problem(bad, 422)
    assert [answer.status_code for answer in answers] == [200] * 7
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.json()["revision"] == expected["revision"]
        for entry, other in zip(answer.json()["predictions"], expected["predictions"], strict=True):
            assert entry["label"] == other["label"]
            assert entry["probability"] == pytest.approx(other["probability"], abs=1e-4)
    assert troubled.metric("gpt_serve_batch_size_count") - batches <= 3
    assert troubled.metric(full) - small <= 2, "the batch was not full"


def test_a_bug_in_the_engine_hits_only_its_own_request(troubled: ServerProcess, image: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(troubled.predict, "sleepy-a", image)
        until(lambda: troubled.in_flight() == 1)
        time.sleep(0.05)
        answers = troubled.predict_all([("good", image), ("bug-a", image), ("good", image)])
        assert slow.result().status_code == 200
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    problem = check_problem(answers[1], 500)
    assert "RuntimeError" not in problem["detail"]


def test_503_at_the_limit(troubled: ServerProcess, image: bytes) -> None:
    """Sixteen slots, of which one task gets twelve, and batches of eight that take 0.4 s each."""
    answers = troubled.predict_all([("sleepy-a", image)] * 28)
    turned_away = [answer for answer in answers if answer.status_code != 200]
    assert 1 <= len(turned_away) <= 28 - 12
    for answer in turned_away:
        assert check_problem(answer, 503)["type"] == "urn:gpt-serve:problem:overloaded"
        assert answer.headers["retry-after"] == "1"
    until(lambda: troubled.in_flight() == 0)
    assert troubled.predict("good", image).status_code == 200


def test_a_flood_for_one_task_leaves_others_their_slots(troubled: ServerProcess, image: bytes) -> None:
    """Twenty clients keep sending for a task that gets twelve of the sixteen slots."""
    stopped = threading.Event()

    def flood() -> list[httpx.Response]:
        answers = []
        while not stopped.is_set():
            answers.append(troubled.predict("sleepy-a", image))
            if answers[-1].status_code != 200:
                time.sleep(0.2)
        return answers

    with ThreadPoolExecutor(20) as pool:
        clients = [pool.submit(flood) for _ in range(20)]
        until(lambda: troubled.in_flight() >= 12)
        others = []
        for _ in range(4):
            time.sleep(0.1)
            others.append(troubled.predict("good", image))
        stopped.set()
        floods = [answer for client in clients for answer in client.result()]
    refused = [answer for answer in floods if answer.status_code != 200]
    assert any("12 requests for this task" in check_problem(answer, 503)["detail"] for answer in refused)
    statuses = [answer.status_code for answer in others]
    assert statuses.count(200) >= 3, f"{statuses}: a refusal takes a slot for a moment, but only that"
    until(lambda: troubled.in_flight() == 0)


def test_the_body_is_not_read_before_admission(troubled: ServerProcess, image: bytes) -> None:
    """Sixteen clients that never finish their bodies fill the queue; they are told so, and the slots come back."""

    def unfinished() -> httpx.Response:
        def body() -> object:
            yield b"{"
            time.sleep(3)
            yield b"}"

        return httpx.post(
            troubled.url + "/predict",
            content=body(),  # type: ignore[arg-type]
            headers={"content-type": "application/json"},
            timeout=10,
        )

    with ThreadPoolExecutor(16) as pool:
        stuck = [pool.submit(unfinished) for _ in range(16)]
        until(lambda: troubled.in_flight() == 16)
        check_problem(troubled.predict("good", image), 503)
        for future in stuck:
            check_problem(future.result(), 400)
    assert troubled.in_flight() == 0


def test_clients_that_leave_give_their_slots_back(troubled: ServerProcess, image: bytes) -> None:
    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(troubled.url + "/predict", data={"task": "sleepy-a"}, files={"image": ("x", image)}, timeout=0.1)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(leave) for _ in range(8)]:
            future.result()
    until(lambda: troubled.in_flight() == 0)
    assert troubled.predict("good", image).status_code == 200


def test_a_hung_worker_gives_504_and_is_replaced(troubled: ServerProcess, image: bytes) -> None:
    """The deadline is 2 s, and a worker that is silent for twice that is killed."""
    before = troubled.metric("gpt_serve_worker_restarts")
    started = time.monotonic()
    answers = troubled.predict_all([("hang-a", image), ("good", image), ("good", image)])
    assert 1.9 < time.monotonic() - started < 10
    assert 504 in {answer.status_code for answer in answers}
    for answer in answers:
        if answer.status_code != 200:  # those in the batch that hangs
            check_problem(answer, 504)
    assert troubled.in_flight() >= 1, "the slot is held until the worker is done"
    until(lambda: troubled.metric("gpt_serve_worker_restarts") == before + 1)
    assert troubled.in_flight() == 0
    check_problem(troubled.predict("good", image), 503)
    until(lambda: troubled.get("/ready").status_code == 200, 60)
    assert troubled.predict("good", image).status_code == 200


def test_a_killed_worker_is_noticed_and_replaced(troubled: ServerProcess, image: bytes) -> None:
    old = troubled.worker_pid()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(troubled.predict, "sleepy-a", image)
        until(lambda: troubled.in_flight() == 1)
        os.kill(old, signal.SIGKILL)
        assert "died" in check_problem(waiting.result(), 503)["detail"]
    not_ready = check_problem(troubled.get("/ready"), 503)
    assert not_ready["type"] == "urn:gpt-serve:problem:not-ready"
    assert troubled.get("/health").status_code == troubled.get("/tasks").status_code == 200
    check_problem(troubled.predict("good", image), 503)
    until(lambda: troubled.get("/ready").status_code == 200, 60)
    assert troubled.worker_pid() != old
    assert len([line for line in troubled.log if "building the ONNX graph" in line]) <= 1, "it was kept"
    assert troubled.predict("good", image).status_code == 200
