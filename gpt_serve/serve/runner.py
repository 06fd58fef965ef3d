"""From options to a running server and back: port, signals, drain, exit."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType

import uvloop
from fastapi import FastAPI

from gpt_serve.errors import NotReady, UsageError
from gpt_serve.serve.app import Door, build_app
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.connections import BACKLOG
from gpt_serve.serve.desk import LocalDesk
from gpt_serve.serve.drain import Drain
from gpt_serve.serve.fronts import Fronts
from gpt_serve.serve.http import HTTPServer
from gpt_serve.serve.litserve import Launcher, PredictAPI
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.process import STOPPING, configure_logging
from gpt_serve.serve.server import Server
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.supervisor import Supervisor
from gpt_serve.serve.watch import StoreWatch
from gpt_serve.serve.workers import Workers

logger = logging.getLogger("gpt_serve.serve")

FOLDER_SECONDS = 5.0  # for the adapter folder to be listed
TICK = 0.1  # seconds between looks at whether it is time to end


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
        state = ServerState(config.queue_limit)
        workers = _workers(config, api, state, Metrics(state))
        desk = LocalDesk(config, workers, state, workers.servers[0].metrics)
        supervisors = [Supervisor(server, partial(_announce, desk, sock)) for server in workers.servers]
        beside = [*(supervisor.run for supervisor in supervisors), StoreWatch(config.adapters, state).run]
        door, drain = Door(config, desk), Drain(workers, config.drain)
        try:
            _warn_if_open(door)
            if config.http_workers == 1:
                app = build_app(door, lambda _: _running(beside, state))
                DrainingServer(door, app, drain).run(sockets=[sock])
            else:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(_run_fronts(Fronts(config, sock, desk), drain, _running(beside, state)))
        finally:
            for supervisor in supervisors:
                supervisor.server.close(supervisor.worker)
            door.close()
    if state.fatal is not None:
        raise state.fatal
    return 1 if drain.dropped else 0


def _workers(config: ServeConfig, api: type[PredictAPI], state: ServerState, metrics: Metrics) -> Workers:
    own = [replace(config, device=device, replicas=1) for device in config.devices]
    launchers = [Launcher(one, api(one)) for one in own]
    servers = [Server(config, launcher.start, state, metrics, number) for number, launcher in enumerate(launchers)]
    return Workers(servers, config.max_batch_size)


class DrainingServer(HTTPServer):
    """Answers HTTP in the process that also has the desk, and drains at a signal."""

    def __init__(self, door: Door, app: FastAPI, drain: Drain) -> None:
        super().__init__(door, app, stopping=lambda: self.should_exit or drain.over())
        self.drain = drain

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Those of uvicorn, and the end of the terminal, unless ``nohup`` asked to outlive it."""
        with super().capture_signals():
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.handle_exit)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain. Runs in the main thread between two bytecodes."""
        self.drain.begin(sig)


async def _run_fronts(fronts: Fronts, drain: Drain, beside: AbstractAsyncContextManager[None]) -> None:
    """Have the HTTP processes answer until a signal, and then until all is answered."""
    loop = asyncio.get_running_loop()
    for sig in STOPPING:
        if signal.getsignal(sig) != signal.SIG_IGN:  # as ``nohup`` leaves it
            loop.add_signal_handler(sig, drain.begin, sig)
    running = asyncio.create_task(fronts.run())
    try:
        async with beside:
            while not drain.over():
                if running.done():
                    running.result()  # raises what went wrong: nobody answers any more
                fronts.stand()
                await asyncio.sleep(TICK)
            await fronts.stop()
            await running
    finally:
        fronts.kill()


@asynccontextmanager
async def _running(functions: Sequence[Callable[[], Awaitable[None]]], state: ServerState) -> AsyncIterator[None]:
    """``functions`` run meanwhile. Without one the server could wait for ever, so the end of any is the end of all."""

    def ended(task: "asyncio.Future[None]") -> None:
        if not task.cancelled() and state.fatal is None:
            logger.error("an internal task ended", exc_info=task.exception())
            state.fatal = NotReady("an internal task ended: the server cannot go on")

    tasks = [asyncio.ensure_future(function()) for function in functions]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    finally:
        for task in tasks:
            task.remove_done_callback(ended)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _warn_if_open(door: Door) -> None:
    if door.keeper.is_open and not _is_loopback(door.config.host):
        logger.warning(
            "anybody who reaches %s may ask: give out keys (--keys), or listen on 127.0.0.1", door.config.host
        )


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


async def _announce(desk: LocalDesk, sock: socket.socket) -> None:
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    spec, count = desk.state.spec, "an unknown number of"
    assert spec is not None
    with suppress(UsageError, TimeoutError):  # the watch says what is wrong with the folder
        count = str(len(await asyncio.wait_for(desk.tasks(), FOLDER_SECONDS)))
    logger.info("ready on http://%s:%d: %s, %s task(s)", host, port, spec.name, count)
