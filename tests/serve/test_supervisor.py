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
        self.mortal = mortal
        self.failed: list[str] = []
        self.started = 0
        self.pending_age = 0.0
        self.worker_ready = loads
        self.worker_error = CheckpointError("the file is damaged")

    def start_worker(self) -> Any:
        self.started += 1
        process = get_context("fork").Process(target=_worker, args=(self.mortal,), daemon=True)
        process.start()
        return process

    async def drained(self) -> None:
        assert not self.failed or len(self.failed) < self.started, "answers that came count before the rest fails"

    def oldest_pending(self) -> float:
        return self.pending_age

    def fail_pending(self, reason: str) -> None:
        self.failed.append(reason)


def _worker(mortal: bool) -> None:
    if mortal:
        os._exit(3)
    signal.pause()


def supervise(server: FakeServer) -> None:
    supervisor = Supervisor(server, announce=lambda: None)  # type: ignore[arg-type]

    async def main() -> None:
        await asyncio.wait_for(supervisor.run(), 30)

    asyncio.run(main())


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


def test_a_worker_that_hangs_is_killed() -> None:
    server = FakeServer(loads=True, mortal=False)
    server.pending_age = 1.0  # more than twice the deadline
    supervise(server)
    assert server.started == MAX_DEATHS
