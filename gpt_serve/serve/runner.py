"""From options to a running server and back: port, signals, drain, exit."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gpt_serve.errors import NotReady, UsageError
from gpt_serve.serve.app import Door, Lifespan, build_app
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.connections import BACKLOG, KEEP_ALIVE_SECONDS, Connection, Connections, connections_possible
from gpt_serve.serve.litserve import Launcher, PredictAPI
from gpt_serve.serve.process import configure_logging
from gpt_serve.serve.server import Server
from gpt_serve.serve.supervisor import Supervisor
from gpt_serve.serve.watch import StoreWatch

logger = logging.getLogger("gpt_serve.serve")

FOLDER_SECONDS = 5.0  # for the adapter folder to be listed
LAST_BYTES = 5  # seconds for clients to take their last answers


def run_server(config: ServeConfig, api: type[PredictAPI] = PredictAPI) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then finish the admitted requests and free the port.

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
        if door.keeper.is_open and not _is_loopback(config.host):
            logger.warning(
                "anybody who reaches %s may ask: give out keys (--keys), or listen on 127.0.0.1", config.host
            )
        supervisor = Supervisor(server, partial(_announce, door, sock))
        try:
            app = build_app(door, _lifespan(server, supervisor, StoreWatch(door)))
            front = DrainingServer(server, app, connections_possible(config.max_connections))
            front.run(sockets=[sock])
        finally:
            server.close(supervisor.worker)
            door.close()
    if server.state.fatal is not None:
        raise server.state.fatal
    return 1 if front.dropped else 0


class DrainingServer(uvicorn.Server):
    """uvicorn, except that a signal first stops admission and waits for the admitted requests.

    The port stays open meanwhile, so that newcomers get a 503 instead of a refused connection.

    Attributes:
        dropped: how many admitted images were still unanswered when the server gave up waiting for them.
    """

    def __init__(self, server: Server, app: FastAPI, max_connections: int) -> None:
        state = server.state
        self.connections = Connections(max_connections, draining=lambda: state.draining, refused=server.metrics.refused)
        # No websockets: nothing here speaks them.
        config = uvicorn.Config(
            app,
            http=partial(Connection, connections=self.connections),  # type: ignore[arg-type]
            loop="uvloop",
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
            timeout_graceful_shutdown=LAST_BYTES,
        )
        super().__init__(config)
        self.server = server
        self.drain_until = float("inf")
        self.dropped = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Those of uvicorn, and the end of the terminal, unless ``nohup`` asked to outlive it."""
        with super().capture_signals():
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.handle_exit)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends it. Runs in the main thread between two bytecodes."""
        if self.server.state.draining:
            self.should_exit = True
            return
        self.server.state.draining = True
        self.drain_until = time.monotonic() + self.server.config.drain
        logger.info("%s: finishing %d image(s)", signal.Signals(sig).name, self.server.state.admitted)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if counter % 10 == 0:
            self.connections.sweep()
        state = self.server.state
        if state.draining and (state.admitted == 0 or time.monotonic() > self.drain_until):
            self.should_exit = True
        if state.fatal is not None:
            self.should_exit = True
        if self.should_exit:
            self._drop()
        return await super().on_tick(counter)

    def _drop(self) -> None:
        self.dropped += self.server.state.admitted
        if self.dropped:
            logger.error("%d admitted image(s) could not be answered before the end", self.dropped)
        self.server.fail_pending("the server is shutting down: try another one, or again later")


def _lifespan(server: Server, supervisor: Supervisor, watch: StoreWatch) -> Lifespan:
    def ended(task: asyncio.Task[None]) -> None:
        """Without these tasks the server could wait for ever, so the end of either is the end of all."""
        if not task.cancelled() and server.state.fatal is None:
            logger.error("an internal task ended", exc_info=task.exception())
            server.state.fatal = NotReady("an internal task ended: the server cannot go on")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(supervisor.run()), asyncio.create_task(watch.run())]
        for task in tasks:
            task.add_done_callback(ended)
        yield
        for task in tasks:
            task.remove_done_callback(ended)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    return lifespan


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(config: ServeConfig) -> socket.socket:
    """A listening socket. Listening, not only bound: only then does a second server's attempt fail."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server(
            (config.host, config.port),
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=config.host == "::" and socket.has_dualstack_ipv6(),  # all addresses: IPv4's, too
        )
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise UsageError(
            f"cannot listen on {config.host} port {config.port} ({reason}): choose another --host or --port"
        ) from None


async def _announce(door: Door, sock: socket.socket) -> None:
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    spec, count = door.state.spec, "an unknown number of"
    assert spec is not None
    with suppress(UsageError, TimeoutError):  # the watch says what is wrong with the folder
        count = str(len(await asyncio.wait_for(door.read(lambda: door.store.tasks()), FOLDER_SECONDS)))
    logger.info("ready on http://%s:%d: %s, %s task(s)", host, port, spec.name, count)
