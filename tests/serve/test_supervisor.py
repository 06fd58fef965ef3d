"""The supervisor's verdicts that would take a real server minutes to reach."""

import asyncio
import os
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from gpt_serve.errors import CheckpointError, NotReady
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.supervisor import MAX_DEATHS, Supervisor


class FakeServer:
    """Workers that are real processes, but do nothing: they exit at once when ``mortal``."""

    def __init__(self, *, loads: bool, mortal: bool) -> None:
        self.config = ServeConfig(adapters=Path("none"), deadline=0.2)
        self.state = ServerState(limit=1)
        self.loads, self.mortal = loads, mortal
        self.failed: list[str] = []
        self.started = 0
        self.pending_age = 0.0
        self.manager_sentinel, self.manager_end = os.pipe()

    def start_worker(self) -> Any:
        self.started += 1
        process = get_context("fork").Process(target=_worker, args=(self.mortal, self.manager_end), daemon=True)
        process.start()
        return process

    def worker_is_ready(self) -> bool:
        return self.loads

    def worker_error(self) -> CheckpointError:
        return CheckpointError("the file is damaged")

    def oldest_pending(self) -> float:
        return self.pending_age

    def fail_pending(self, reason: str) -> None:
        self.failed.append(reason)


def _worker(mortal: bool, inherited: int) -> None:
    os.close(inherited)
    if mortal:
        os._exit(3)
    signal.pause()


def supervise(server: FakeServer, *, kill_manager: bool = False) -> Supervisor:
    supervisor = Supervisor(server, announce=lambda: None)  # type: ignore[arg-type]

    async def main() -> None:
        if kill_manager:
            asyncio.get_running_loop().call_later(0.3, os.close, server.manager_end)
        await asyncio.wait_for(supervisor.run(), 30)

    asyncio.run(main())
    return supervisor


def test_a_crash_loop_ends_the_server() -> None:
    server = FakeServer(loads=True, mortal=True)
    supervise(server)
    assert server.started == MAX_DEATHS == len(server.failed)
    assert isinstance(server.state.fatal, NotReady) and f"{MAX_DEATHS} times" in str(server.state.fatal)
    with pytest.raises(NotReady):
        server.state.check_ready()


def test_a_worker_that_cannot_load_is_not_tried_again() -> None:
    server = FakeServer(loads=False, mortal=True)
    supervise(server)
    assert server.started == 1
    assert isinstance(server.state.fatal, CheckpointError)


def test_without_its_queues_the_server_ends() -> None:
    server = FakeServer(loads=True, mortal=False)
    supervisor = supervise(server, kill_manager=True)
    assert "queue process" in str(server.state.fatal) and server.started == 1
    assert supervisor.worker is not None
    supervisor.worker.kill()
    supervisor.worker.join()


def test_a_worker_that_hangs_is_killed() -> None:
    server = FakeServer(loads=True, mortal=False)
    server.pending_age = 1.0  # more than twice the deadline
    supervise(server)
    assert server.started == MAX_DEATHS
