"""The HTTP processes as seen from the desk: started, heard for signs of life, started again, stopped."""

import asyncio
import inspect
import logging
import socket
import time
from collections.abc import Awaitable
from contextlib import suppress
from ctypes import c_int
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from typing import Any

from gpt_serve.errors import GPTServeError, NotReady
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.desk import LocalDesk
from gpt_serve.serve.front import GONE, run_front, share_of
from gpt_serve.serve.keyfile import Tenant
from gpt_serve.serve.link import Link
from gpt_serve.serve.messages import Call, Failure, NoLonger, Returned, Standing, Stop
from gpt_serve.serve.process import DEATH_WINDOW, MAX_DEATHS, holding_signals, readable

logger = logging.getLogger("gpt_serve.serve")

START_SECONDS = 60.0  # for a front to give its first sign of life
STOP_SECONDS = 8.0  # for all of them to end, with what clients still have to take


class Window:
    """Where one front comes to the desk. What it holds there is given back when it ends.

    Args:
        desk: what it asks.
        link: to the front.
    """

    def __init__(self, desk: LocalDesk, link: Link) -> None:
        self.desk = desk
        self.link = link
        self.alive_until = time.monotonic() + START_SECONDS
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._taken: list[tuple[Tenant, int]] = []
        self._told: Standing | None = None

    def receive(self, messages: list[Call | NoLonger]) -> None:
        """Take what the front says."""
        for message in messages:
            if isinstance(message, NoLonger):
                if (future := self._pending.get(message.number)) is not None:
                    future.cancel()
            elif message.name == "beat":
                self.alive_until = time.monotonic() + 2 * self.desk.config.deadline
            else:
                self._handle(message)

    def stand(self) -> None:
        """Tell the front how the server stands, if that is news."""
        standing = Standing.of(self.desk.state)
        if standing != self._told:
            self._told = standing
            self.link.send(standing)

    def ended(self) -> None:
        """The front is gone: nobody waits for anything of it."""
        for future in list(self._pending.values()):
            future.cancel()
        for tenant, count in self._taken:
            self.desk.give(tenant, count)
        self._taken.clear()

    def _handle(self, call: Call) -> None:
        if call.name == "give":
            self._taken.remove(call.arguments)
        result: Awaitable[Any] | None = getattr(self.desk, call.name)(*call.arguments)
        if call.number is None:
            return
        assert result is not None and (inspect.iscoroutine(result) or asyncio.isfuture(result))
        future = self._pending[call.number] = asyncio.ensure_future(result)
        future.add_done_callback(partial(self._done, call))

    def _done(self, call: Call, future: "asyncio.Future[Any]") -> None:
        assert call.number is not None
        del self._pending[call.number]
        if future.cancelled():
            return
        error = future.exception()
        if call.name == "take" and error is None:
            self._taken.append(call.arguments)
        self.link.send(Returned(call.number, future.result() if error is None else _failure(error)))


class Fronts:
    """Runs the HTTP processes until told to stop.

    Args:
        config: the options.
        sock: listening; all of them accept from it.
        desk: what they ask.
    """

    def __init__(self, config: ServeConfig, sock: socket.socket, desk: LocalDesk) -> None:
        self.config = config
        self.sock = sock
        self.desk = desk
        self.processes: dict[int, SpawnProcess] = {}
        self._windows: dict[int, Window] = {}
        # Not counted under a lock: one that is late or wrong by one does no harm.
        self._counts = get_context("spawn").RawArray(c_int, [GONE] * config.http_workers)
        self._stopping = False
        self._deaths: list[float] = []

    async def run(self) -> None:
        """Returns once all have ended; with ``state.fatal`` set when they die again and again."""
        await asyncio.gather(*(self._keep(number) for number in range(self.config.http_workers)))

    def stand(self) -> None:
        """Tell all of them how the server stands, if that is news."""
        for window in self._windows.values():
            window.stand()

    async def stop(self) -> None:
        """Have them answer what they have and end; those that do not end are killed."""
        self._stopping = True
        self.stand()
        for window in self._windows.values():
            window.link.send(Stop())
        end = time.monotonic() + STOP_SECONDS
        while self.processes and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """End what is left of them at once."""
        self._stopping = True
        for process in self.processes.values():
            process.kill()
            process.join()

    async def _keep(self, number: int) -> None:
        while not self._stopping and self.desk.state.fatal is None:
            try:
                link = Link()
                self.processes[number] = process = self._start(number, link)
            except OSError as error:  # too many files or processes just now
                logger.error("an HTTP process cannot be started: %s; trying again", error.strerror)
                await asyncio.sleep(1)
                continue
            died = readable(process.sentinel)
            self._windows[number] = window = Window(self.desk, link)
            await link.start(window.receive, window.ended)
            window.stand()
            await self._until_dead(process, window, died)
            link.close()
            del self.processes[number], self._windows[number]
            process.join()
            self._counts[number] = GONE
            if not self._stopping:
                self._count_death(process.exitcode)

    def _start(self, number: int, link: Link) -> SpawnProcess:
        share = share_of(self.config, self.config.http_workers)
        process = get_context("spawn").Process(
            target=run_front, args=(share, self.sock, self._counts, number, link.worker), daemon=True
        )
        with holding_signals():
            process.start()
        return process

    async def _until_dead(self, process: SpawnProcess, window: Window, died: asyncio.Event) -> None:
        while not died.is_set():
            if time.monotonic() > window.alive_until:
                logger.error("an HTTP process gives no sign of life: killing it")
                process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(died.wait(), 1)

    def _count_death(self, exitcode: int | None) -> None:
        logger.error("an HTTP process died (exit code %s)", exitcode)
        self._deaths = [at for at in self._deaths if at > time.monotonic() - DEATH_WINDOW] + [time.monotonic()]
        if len(self._deaths) >= MAX_DEATHS * self.config.http_workers:
            self.desk.state.fatal = NotReady("the HTTP processes die again and again: the server gives up")


def _failure(error: BaseException) -> Failure:
    if not isinstance(error, GPTServeError):
        logger.error("internal error while answering an HTTP process: %s", error, exc_info=error)
    return Failure.of(error)
