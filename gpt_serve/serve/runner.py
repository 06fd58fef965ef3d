"""From options to a running server and back: port, signals, drain, exit."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gpt_serve.errors import NotReady, UsageError
from gpt_serve.serve.app import Door, Lifespan, build_app
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.litserve import Launcher, PredictAPI
from gpt_serve.serve.process import configure_logging
from gpt_serve.serve.server import Server
from gpt_serve.serve.supervisor import Supervisor

logger = logging.getLogger("gpt_serve.serve")

BACKLOG = 2048
LAST_BYTES = 5  # seconds for clients to take their last answers


def run_server(config: ServeConfig, api: type[PredictAPI] = PredictAPI) -> int:
    """Serve until SIGTERM or SIGINT, then finish the admitted requests and free the port.

    Returns:
        0, or 1 when admitted requests were still unanswered after ``config.drain`` seconds.

    Raises:
        UsageError: the port cannot be had; nothing was loaded.
        GPTServeError: the backbone cannot be loaded, or the worker dies again and again.
    """
    configure_logging()
    # For the worker's torch: threads that spin while they wait fight the API process and each other for the cores
    # (measured on two busy ones: 13 ms per image instead of 38).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _listen(config) as sock:
        server = Server(config, Launcher(config, api(config)).start)
        door = Door(config, server, server.state, server.metrics)
        supervisor = Supervisor(server, lambda: _announce(door, sock))
        try:
            app = build_app(door, _lifespan(server, supervisor))
            DrainingServer(server, app).run(sockets=[sock])
        finally:
            server.close(supervisor.worker)
    if server.state.fatal is not None:
        raise server.state.fatal
    return 1 if server.state.admitted else 0


class DrainingServer(uvicorn.Server):
    """uvicorn, except that a signal first stops admission and waits for the admitted requests.

    The port stays open meanwhile, so that newcomers get a 503 instead of a refused connection.
    """

    def __init__(self, server: Server, app: FastAPI) -> None:
        # h11, because it bounds the size of headers; no websockets: nothing here speaks them.
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_BYTES,
        )
        super().__init__(config)
        self.server = server
        self.drain_until = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends it. Runs in the main thread between two bytecodes."""
        if self.server.state.draining:
            self.should_exit = True
            return
        self.server.state.draining = True
        self.drain_until = time.monotonic() + self.server.config.drain
        logger.info("%s: finishing %d request(s)", signal.Signals(sig).name, self.server.state.admitted)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        state = self.server.state
        if state.draining and (state.admitted == 0 or time.monotonic() > self.drain_until):
            self.should_exit = True
        if state.fatal is not None:
            self.should_exit = True
        if self.should_exit:
            self.server.fail_pending("the server is shutting down: try another one, or again later")
        return await super().on_tick(counter)


def _lifespan(server: Server, supervisor: Supervisor) -> Lifespan:
    def ended(task: asyncio.Task[None]) -> None:
        """Without the supervisor the server could wait for ever, so its end is the end of all."""
        if not task.cancelled() and server.state.fatal is None:
            logger.error("the server's supervisor ended", exc_info=task.exception())
            server.state.fatal = NotReady("an internal task ended: the server cannot go on")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(supervisor.run())
        task.add_done_callback(ended)
        yield
        task.remove_done_callback(ended)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    return lifespan


def _listen(config: ServeConfig) -> socket.socket:
    """A listening socket. Listening, not only bound: only then does a second server's attempt fail."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise UsageError(
            f"cannot listen on {config.host} port {config.port} ({reason}): choose another --host or --port"
        ) from None


def _announce(door: Door, sock: socket.socket) -> None:
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    assert door.state.spec is not None
    logger.info("ready on http://%s:%d: %s, %d task(s)", host, port, door.state.spec.name, len(door.store.tasks()))
