"""One of several processes that answer HTTP on the same port. Everything that must be exact is at the desk, elsewhere.

It imports no torch, so it is small and starts quickly. It obeys no signals: it ends when it is told to by the process
that started it, or with that process.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from ctypes import Array, c_int
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from fastapi import FastAPI

from gpt_serve.serve.app import Door, build_app
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.http import HTTPServer
from gpt_serve.serve.keyfile import Tenant
from gpt_serve.serve.link import Link
from gpt_serve.serve.messages import Answer, Call, Failure, Item, NoLonger, Returned, Standing, Stop
from gpt_serve.serve.process import configure_logging, end_child, guard_child
from gpt_serve.serve.state import ServerState

logger = logging.getLogger("gpt_serve.serve")

PAUSE = 0.1  # seconds until the next attempt to accept after one that failed
POLITE = 0.01  # seconds that other processes get to accept a connection first
GONE = 2**30  # connections of a process that takes none


def run_front(
    config: ServeConfig, sock: socket.socket, counts: "Array[c_int]", number: int, end: "Connection[Any, Any]"
) -> None:
    """Answer HTTP on ``sock``, asking the desk at the other end of ``end``, until told to stop.

    Args:
        config: the options; limits that count connections and memory are this process's share of them.
        sock: listening; other processes may accept from it, too.
        counts: how many connections each of them has.
        number: of this one.
    """
    guard_child()
    configure_logging()
    desk = RemoteDesk()
    door = Door(config, desk)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        link = Link(end)
        desk.link = link
        await link.start(desk.receive, end_child)
        yield
        door.close()

    app = build_app(door, lifespan)
    Front(sock, counts, number, door, app, stopping=lambda: desk.stopped, every_second=desk.beat).run()


class Front(HTTPServer):
    """Answers HTTP, and leaves signals to the process that started it.

    It accepts one connection each time that its event loop comes round, and lets the others go first when it has more
    than they have. uvicorn's way, to accept all that are there, leaves one process with all that come at once.

    Args:
        sock: listening; shared with other processes.
        counts: how many connections each process has; shared with them, too.
        number: of this one.
        door: and all else, see `HTTPServer`.
    """

    def __init__(
        self, sock: socket.socket, counts: "Array[c_int]", number: int, door: Door, app: FastAPI, **options: Any
    ) -> None:
        super().__init__(door, app, **options)
        self.counts = counts
        self.number = number
        self.sock = sock
        self.sock.setblocking(False)
        self._beginning: set[asyncio.Task[Any]] = set()  # the loop itself holds tasks weakly

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets=[])
        self._listen()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and finish what is being answered."""
        asyncio.get_running_loop().remove_reader(self.sock)
        self.sock.close()
        await super().shutdown(sockets=[])

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: tell the others how many connections there are, and whether to stop."""
        self._count()
        return await super().on_tick(counter)

    def _listen(self) -> None:
        if self.sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self.sock, self._accept_in_turn)

    def _count(self) -> int:
        own = self.counts[self.number] = len(self.connections.open) + len(self._beginning)
        return own

    def _accept_in_turn(self) -> None:
        loop, least = asyncio.get_running_loop(), min(self.counts)
        if self._count() <= least + least // 4 + 1:
            self._accept()
        else:
            loop.remove_reader(self.sock)
            loop.call_later(POLITE, self._accept_late)

    def _accept_late(self) -> None:
        """Take what the others, who may hang, have left."""
        if self.sock.fileno() >= 0:
            self._listen()
            self._accept()

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self.sock.accept()
        except BlockingIOError:
            return  # another process was quicker
        except OSError as error:  # too many files just now
            logger.error("a connection cannot be accepted: %s", error.strerror)
            loop.remove_reader(self.sock)
            loop.call_later(PAUSE, self._listen)
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self._beginning.add(task)
        task.add_done_callback(self._begun)

    def _begun(self, task: "asyncio.Task[Any]") -> None:
        self._beginning.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a connection could not begin", exc_info=task.exception())

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield


def share_of(config: ServeConfig, fronts: int) -> ServeConfig:
    """The options of one of ``fronts`` processes: its part of the connections."""
    return replace(config, max_connections=-(-config.max_connections // fronts))


class RemoteDesk:
    """The desk in another process, see `gpt_serve.serve.desk.Desk`.

    Attributes:
        state: as the desk's was when it last told.
        link: to it; set before anything is asked.
        stopped: whether this process is to end.
    """

    link: Link

    def __init__(self) -> None:
        self.state = ServerState(limit=0)
        self.stopped = False
        self._numbers = count()
        self._pending: dict[int, asyncio.Future[Any]] = {}

    def receive(self, messages: list[Returned | Standing | Stop]) -> None:
        """Take what the desk says."""
        for message in messages:
            if isinstance(message, Returned):
                self._settle(message)
            elif isinstance(message, Standing):
                message.apply(self.state)
            else:
                self.stopped = True

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        """Have ``item`` answered. The future raises the error that the desk's raised."""
        return self._call("ask", item)

    async def count_request(self, tenant: Tenant) -> None:
        """Count a request; a tenant without limits is not counted."""
        if tenant.rate is not None:
            await self._call("count_request", tenant)

    async def take(self, tenant: Tenant, count: int) -> None:
        """Count ``count`` answers until `give`."""
        if tenant.is_limited:
            await self._call("take", tenant, count)

    def give(self, tenant: Tenant, count: int) -> None:
        """They are no longer on their way."""
        if tenant.is_limited:
            self._tell("give", tenant, count)

    def answered(
        self, route: str, tenant: str, status: int, answers: Iterable[tuple[str, int]], seconds: float
    ) -> None:
        """Count a request that has its answer."""
        self._tell("answered", route, tenant, status, list(answers), seconds)

    def refused(self, status: int) -> None:
        """Count an answer to what never became a request."""
        self._tell("refused", status)

    def beat(self) -> None:
        """Say that this process's event loop runs."""
        self._tell("beat")

    async def exposition(self) -> bytes:
        """The metrics of all processes."""
        return bytes(await self._call("exposition"))

    async def tasks(self) -> list[str]:
        """The names of the stored tasks."""
        return list(await self._call("tasks"))

    async def listing(self, tenant: Tenant) -> bytes:
        """The tasks that ``tenant`` may ask, as JSON."""
        return bytes(await self._call("listing", tenant))

    async def summary(self, task: str) -> dict[str, Any]:
        """One adapter."""
        return dict(await self._call("summary", task))

    def _tell(self, name: str, *arguments: Any) -> None:
        self.link.send(Call(None, name, arguments))

    def _call(self, name: str, *arguments: Any) -> "asyncio.Future[Any]":
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        future.add_done_callback(partial(self._done, number))
        self.link.send(Call(number, name, arguments))
        return future

    def _done(self, number: int, future: "asyncio.Future[Any]") -> None:
        del self._pending[number]
        if future.cancelled():
            self.link.send(NoLonger(number))

    def _settle(self, returned: Returned) -> None:
        future = self._pending.get(returned.number)
        if future is None or future.done():
            return
        if isinstance(returned.value, Failure):
            future.set_exception(returned.value.error())
        else:
            future.set_result(returned.value)
