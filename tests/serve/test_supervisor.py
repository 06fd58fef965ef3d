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
        self.stuck_for = 0.0
        self.worker_ready = loads
        self.worker_error = CheckpointError("the file is damaged")

    def enter(self, phase: Any) -> None:
        self.state.enter(0, phase)

    async def start_worker(self) -> Any:
        self.started += 1
        process = get_context("fork").Process(target=_worker, args=(self.mortal,), daemon=True)
        process.start()
        return process

    async def drained(self) -> None:
        assert not self.failed or len(self.failed) < self.started, "answers that came count before the rest fails"

    def stuck(self) -> float:
        return self.stuck_for

    def fail_pending(self, reason: str) -> None:
        self.failed.append(reason)


def _worker(mortal: bool) -> None:
    if mortal:
        os._exit(3)
    signal.pause()


def supervise(server: FakeServer) -> None:
    supervisor = Supervisor(server, announce=lambda: asyncio.sleep(0))  # type: ignore[arg-type]

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
    server.stuck_for = 1.0  # more than twice the deadline
    supervise(server)
    assert server.started == MAX_DEATHS


def test_a_worker_that_never_loads_is_killed_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer(loads=False, mortal=False)
    server.worker_error = None  # type: ignore[assignment]
    server.config = ServeConfig(adapters=Path("none"), load_timeout=0.2)
    supervise(server)
    assert server.started == 1
    assert isinstance(server.state.fatal, NotReady) and "within 0 s" in str(server.state.fatal)


def test_too_many_open_files_do_not_end_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.pipe` fails while strangers hold all descriptors; a moment later it does not."""
    monkeypatch.setattr("gpt_serve.serve.supervisor.RETRY", 0.01)
    server = FakeServer(loads=False, mortal=True)
    start, attempts = server.start_worker, iter([OSError(24, "Too many open files"), None])

    async def start_worker() -> Any:
        error = next(attempts)
        if error is not None:
            raise error
        return await start()

    server.start_worker = start_worker  # type: ignore[method-assign]
    supervise(server)
    assert isinstance(server.state.fatal, CheckpointError)
