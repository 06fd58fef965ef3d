"""Several processes that answer HTTP, from outside: one server, whichever of them a connection reaches."""

import http.client
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpt_serve.serve.keyfile import add_key
from tests.serve.harness import START_SECONDS, ServerProcess, children, is_alive, port_is_free, serving, until

FRONTS = 2


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The file of two tenants, and their keys."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    limits = {"owner": {}, "slow": {"rate": 4.0}, "narrow": {"in_flight": 3}}
    return path, {name: add_key(path, name, **options)[0] for name, options in limits.items()}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, dict[str, str]]) -> Iterator[ServerProcess]:
    """A stub with 6 slots behind two HTTP processes, with keys."""
    folder = tmp_path_factory.mktemp("many")
    for server in serving(folder, stub=True, queue_limit=6, http_workers=FRONTS, keys=str(keys[0])):
        server.client.headers["x-api-key"] = keys[1]["owner"]
        yield server


def ask(server: ServerProcess, task: str, key: str = "") -> int:
    headers = {"x-api-key": key} if key else {}
    return server.client.post(f"{server.url}/predict/{task}", content=b"image", headers=headers).status_code


def fronts(server: ServerProcess) -> list[int]:
    """The processes that have the port open, but for the one that only keeps it."""
    inode = next(
        line.split()[9]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if int(line.split()[1].rpartition(":")[2], 16) == server.port and line.split()[3] == "0A"
    )
    found = []
    for pid in children(server.pid):
        descriptors = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
        found += [pid] * (f"socket:[{inode}]" in descriptors)
    return found


def test_they_answer_and_count_together(many: ServerProcess) -> None:
    before = many.metric('gpt_serve_answers_total{route="/predict/{task}",status="200"}')
    assert len(fronts(many)) == FRONTS
    with ThreadPoolExecutor(5) as pool:
        assert set(pool.map(lambda _: ask(many, "any"), range(100))) == {200}
    until(lambda: many.metric('gpt_serve_answers_total{route="/predict/{task}",status="200"}') == before + 100)
    assert many.metric('gpt_serve_requests_total{status="200",task="any",tenant="owner"}') == 100


def test_connections_are_shared_out(many: ServerProcess) -> None:
    """Also those that come at once; one process would otherwise accept them all."""
    connections = [http.client.HTTPConnection("127.0.0.1", many.port) for _ in range(32)]
    for connection in connections:
        connection.connect()
    for connection in connections:
        connection.request("GET", "/health")
    for connection in connections:
        assert connection.getresponse().status == 200
    open_sockets = [
        sum(os.readlink(path).startswith("socket:") for path in Path(f"/proc/{pid}/fd").iterdir())
        for pid in fronts(many)
    ]
    assert min(open_sockets) >= 8, open_sockets
    for connection in connections:
        connection.close()


def test_slots_are_those_of_all_together(many: ServerProcess) -> None:
    with ThreadPoolExecutor(10) as pool, many.holding():
        pending = [pool.submit(ask, many, "held-a") for _ in range(6)]
        until(lambda: many.in_flight() == 6)
        assert [ask(many, "held-a") for _ in range(4)] == [503] * 4
        quiet = pool.submit(ask, many, "held-b")
        until(lambda: sorted(job.result() for job in pending if job.done()) == [503])
    assert sorted(job.result() for job in pending) == [200] * 5 + [503] and quiet.result() == 200
    until(lambda: many.in_flight() == 0)


def test_limits_of_a_tenant_hold_across_them(many: ServerProcess, keys: tuple[Path, dict[str, str]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: ask(many, "any", keys[1]["slow"]), range(12)))
    assert statuses.count(429) >= 6 and statuses.count(200) >= 4
    with ThreadPoolExecutor(8) as pool, many.holding():
        pending = [pool.submit(ask, many, "held-a", keys[1]["narrow"]) for _ in range(3)]
        until(lambda: many.in_flight() == 3)
        assert [ask(many, "held-a", keys[1]["narrow"]) for _ in range(4)] == [429] * 4
    assert [job.result() for job in pending] == [200] * 3
    assert ask(many, "any", keys[1]["narrow"]) == 200


def test_clients_that_leave_give_their_slots_back(many: ServerProcess) -> None:
    with many.holding():
        connections = [http.client.HTTPConnection("127.0.0.1", many.port) for _ in range(4)]
        for connection in connections:
            connection.request("POST", "/predict/held-a", b"image", dict(many.client.headers))
        until(lambda: many.in_flight() == 4)
        for connection in connections:
            connection.close()
        until(lambda: many.in_flight() == 0)


def test_one_that_is_killed_gives_its_slots_back_and_is_started_again(
    many: ServerProcess, keys: tuple[Path, dict[str, str]]
) -> None:
    killed = fronts(many)
    with ThreadPoolExecutor(3) as pool, many.holding():
        pending = [pool.submit(ask, many, "held-a", keys[1]["narrow"]) for _ in range(3)]
        until(lambda: many.in_flight() == 3)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        for job in pending:
            assert job.exception() is not None
        until(lambda: many.in_flight() == 0, START_SECONDS)
        until(lambda: len(fronts(many)) == FRONTS and not set(fronts(many)) & set(killed), START_SECONDS)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: ask(many, "any", keys[1]["narrow"]), range(3))) == {200}
    assert len([line for line in many.log if "an HTTP process died" in line]) == FRONTS


def test_a_signal_drains_all_of_them(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, stub=True, http_workers=FRONTS) as server:
        server.wait_ready()
        processes = children(server.pid)
        with ThreadPoolExecutor(8) as pool:
            with server.holding():
                pending = [pool.submit(ask, server, "held-a") for _ in range(8)]
                until(lambda: server.in_flight() == 8)
                os.killpg(server.pid, signal.SIGTERM)  # as a service manager does: children get it too
                until(lambda: server.get("/ready").status_code == 503)
                assert [ask(server, "any") for _ in range(4)] == [503] * 4
            assert [job.result() for job in pending] == [200] * 8
        assert server.wait() == 0
        assert port_is_free(server.port)
        until(lambda: not any(is_alive(pid) for pid in processes))
        assert not [line for line in server.log if "Traceback" in line or "ERROR" in line], server.log


def test_they_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, stub=True, http_workers=FRONTS) as server:
        server.wait_ready()
        processes = children(server.pid)
        server.signal(signal.SIGKILL)
        server.process.wait()
        until(lambda: not any(is_alive(pid) for pid in processes))
        assert port_is_free(server.port)
