"""What a connection may cost, whoever is at its other end: uvicorn's protocol on httptools, with limits.

A connection is *waiting* while it has no request in progress: before its first headers are complete, between two
requests, and while what is left of a refused body is thrown away. Each waiting connection has a time by which it must
get on, and when there are too many, the one that has waited longest makes room for the newcomer.
"""

import logging
import resource
import time
from collections.abc import Callable
from typing import Any

import httptools
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gpt_serve.errors import InvalidRequest, Overloaded, UsageError
from gpt_serve.serve import problems
from gpt_serve.serve.problems import HTTPError

logger = logging.getLogger("gpt_serve.serve")

HEADER_SECONDS = 10.0  # from the connection, or the first byte of a later request, to the last header
KEEP_ALIVE_SECONDS = 75.0  # between two requests
ANSWER_SECONDS = 60.0  # for the client to take an answer
LINGER_SECONDS = 5.0  # for a client to notice that its request was answered early
LINGER_BYTES = 16 * 2**20  # of the refused body that are read and thrown away meanwhile
MAX_HEADER_BYTES = 64 * 2**10
MAX_PIPELINED = 8
FREE_CHUNKS, CHUNK_BYTES = 1024, 64  # a body may come in this many pieces, and one more for each so many bytes

BACKLOG = 256  # connections that the kernel may hand over at once, before any can be turned away
OWN_FILES = 128  # descriptors for everything else: pipes, logs, modules, a new worker


class Connections:
    """All connections of a process, and what they share.

    Args:
        most: how many there may be.
        draining: whether the server is going down, so that no connection is kept for another request.
        refused: told the status of each answer that is given to bytes which never became a request.
    """

    def __init__(self, most: int, *, draining: Callable[[], bool], refused: Callable[[int], None]) -> None:
        self.most = most
        self.draining = draining
        self.refused = refused
        self.open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # the longest first
        self._until: dict[Connection, float] = {}

    def add(self, connection: "Connection") -> bool:
        """Take on a connection, in place of the one that has waited longest if need be; False if none is waiting."""
        if len(self.open) >= self.most:
            if not self._waiting:
                return False
            self.end(next(iter(self._waiting)))
        self.open.add(connection)
        return True

    def wait(self, connection: "Connection", seconds: float) -> None:
        """``connection`` is waiting from now on, for ``seconds`` at most."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = None
        self._until[connection] = time.monotonic() + seconds

    def work(self, connection: "Connection", seconds: float | None = None) -> None:
        """``connection`` has a request in progress from now on; ``seconds`` bound it where nothing else does."""
        self._waiting.pop(connection, None)
        self._until.pop(connection, None)
        if seconds is not None:
            self._until[connection] = time.monotonic() + seconds

    def remove(self, connection: "Connection") -> None:
        """``connection`` is closed."""
        self.work(connection)
        self.open.discard(connection)

    def end(self, connection: "Connection") -> None:
        """Close ``connection`` at once, whatever is unsent."""
        self.remove(connection)
        connection.raw.abort()

    def sweep(self) -> None:
        """End the connections whose time is up; to be called about once a second."""
        now = time.monotonic()
        for connection in [connection for connection, until in self._until.items() if until < now]:
            self.end(connection)


class Connection(HttpToolsProtocol):
    """One connection: uvicorn's, except for its limits and the ways in which it ends.

    A request that is answered before its body is read is followed by a bounded pause in which the rest of the body is
    thrown away: closing a socket with unread bytes makes the kernel send a reset, which can overtake the answer.
    """

    def __init__(self, *args: Any, connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.all = connections
        self.raw: Any = None  # the transport itself
        self.lingered: int | None = None  # bytes thrown away; None before the end
        self.refusal: Exception = InvalidRequest("these bytes are not an HTTP/1.1 request")
        self._header_bytes = self._unparsed = self._chunks = self._chunk_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Take the connection on, or refuse it."""
        self.raw = transport
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        if self.all.add(self):
            self.all.wait(self, HEADER_SECONDS)
        else:
            self._refuse(Overloaded("the server has as many connections as it can hold: try again in a second"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.all.remove(self)
        self.lingered = 0  # there is nothing to close any more
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, as long as that is of use."""
        if self.lingered is not None:
            self.lingered += len(data)
            if self.lingered > LINGER_BYTES:
                self.all.end(self)
            return
        self._unset_keepalive_if_required()
        self._unparsed += len(data)
        try:
            self.parser.feed_data(data)
            if self._in_headers() and self._unparsed > MAX_HEADER_BYTES:
                raise self._too_long()
        except httptools.HttpParserUpgrade:
            pass  # answered as what it also is, a plain request
        except (httptools.HttpParserError, HTTPError):
            self._refuse(self.refusal)

    def on_message_begin(self) -> None:
        """A request begins: its headers must come in time."""
        super().on_message_begin()
        self._header_bytes = self._chunks = self._chunk_bytes = 0
        if self.cycle is not None and self.cycle.response_complete:
            self.all.wait(self, HEADER_SECONDS)

    def on_url(self, url: bytes) -> None:
        """Part of the request's target."""
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer of a body in chunks."""
        self._count_header(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request goes to the application, or into the line behind one that is not answered yet."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self.refusal = InvalidRequest("too many requests at once on one connection: wait for answers")
            raise self.refusal
        super().on_headers_complete()
        self.all.work(self)

    def on_body(self, body: bytes) -> None:
        """Part of a body; in pieces so small that taking them in costs more than they hold, it is refused."""
        self._chunks += 1
        self._chunk_bytes += len(body)
        if self._chunks > FREE_CHUNKS + self._chunk_bytes // CHUNK_BYTES:
            self.refusal = InvalidRequest("the body comes in far too small chunks: send it in larger ones")
            raise self.refusal
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has been received whole."""
        self._unparsed = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The connection waits for its next request, or ends where the rest of this one is not worth reading."""
        if self.cycle.more_body:
            self.transport.close()
        super().on_response_complete()
        if self.lingered is None and not self.raw.is_closing() and self.cycle.response_complete:
            self.all.wait(self, KEEP_ALIVE_SECONDS)

    def finish(self) -> None:
        """Close the connection; while bytes of a request may still come, only its own side of it."""
        if self.lingered is not None:
            return
        if self._unparsed == 0:
            self.raw.close()
            self.all.wait(self, LINGER_SECONDS)  # for the client to take what is unsent
        else:
            self._linger()

    def _linger(self) -> None:
        self.lingered = 0
        self.flow.resume_reading()
        self.raw.write_eof()
        self.all.wait(self, LINGER_SECONDS)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Have ``app`` answer, saying so when no other request can follow on the connection."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def sending(message: Any) -> None:
                if message["type"] == "http.response.start":
                    if cycle.more_body or self.all.draining():
                        cycle.keep_alive = False
                    if self in self.all.open:
                        self.all.work(self, ANSWER_SECONDS)
                await send(message)

            await app(scope, receive, sending)

        super()._start_asgi_task(cycle, answer)

    def _in_headers(self) -> bool:
        return self.cycle is None or (not self.cycle.more_body and self._unparsed > 0)

    def _count_header(self, length: int) -> None:
        self._header_bytes += length
        if self._header_bytes > MAX_HEADER_BYTES:
            raise self._too_long()

    def _too_long(self) -> HTTPError:
        error = HTTPError(431, f"the request's headers have more than {MAX_HEADER_BYTES} bytes: send fewer")
        self.refusal = error
        return error

    def _refuse(self, error: Exception) -> None:
        """Answer with a problem, unless another answer has begun, and end."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.all.end(self)
            return
        if cycle is not None:
            cycle.disconnected = True  # as far as the application is concerned
            cycle.message_event.set()
        response = problems.problem_of(error)
        self.all.refused(response.status_code)
        self.raw.write(_serialised(response))
        self._linger()


class _Lingering:
    """A transport whose `close` is the connection's `Connection.finish`."""

    def __init__(self, transport: Any, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection

    def close(self) -> None:
        self._connection.finish()

    def is_closing(self) -> bool:
        return self._connection.lingered is not None or bool(self._transport.is_closing())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def connections_possible(wanted: int) -> int:
    """How many connections of ``wanted`` this process can hold; raises its limit of open files where it may.

    Raises:
        UsageError: the limit leaves no room for any.
    """
    needed = wanted + BACKLOG + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    possible = soft - BACKLOG - OWN_FILES
    if possible < 1:
        raise UsageError(f"{soft} open files are too few for a server: raise the limit (ulimit -n) to {needed}")
    logger.warning("%d open files are allowed: %d connections instead of %d", soft, possible, wanted)
    return possible


def _serialised(response: Response) -> bytes:
    """A whole response that ends its connection."""
    lines = [name + b": " + value for name, value in response.raw_headers]
    head = STATUS_LINE[response.status_code] + b"\r\n".join([*lines, b"connection: close"])
    return head + b"\r\n\r\n" + bytes(response.body)
