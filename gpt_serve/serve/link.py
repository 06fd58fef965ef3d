"""A socket between the server and one worker: items one way, messages the other, as many to a write as there are.

LitServe's own queues live in a process of their own, through which each upload and each answer would pass on its way.
A socket ends when either process does, so neither waits for the other in vain, and a new worker gets a new one: nothing
that a dead one left behind can reach it. The worker reads and writes its end with `multiprocessing.connection`, in
threads; the server's end belongs to the event loop, because a change of threads costs more than all else on the way.
"""

import asyncio
import os
import pickle
import socket
import struct
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, cast

# How `multiprocessing.connection` frames what it pickles: the length, and where that is -1 a longer one behind it.
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!iQ")
_MOST_SHORT = 0x7FFFFFFF


class Link(asyncio.Protocol):
    """The side of an event loop, which alone touches it.

    Args:
        end: the end that another process gave to this one; by default there is a new pair of them.

    Attributes:
        worker: of a new pair the end that is to be given away. Each ``recv`` gives a list of what was sent, one item or
            more; what it sends is received one by one.
    """

    def __init__(self, end: "Connection[Any, Any] | None" = None) -> None:
        ours, self.worker = Pipe(duplex=True) if end is None else (end, end)
        self._socket = socket.socket(fileno=os.dup(ours.fileno()))
        ours.close()
        self._loop: asyncio.AbstractEventLoop
        self._transport: asyncio.WriteTransport | None = None
        self._outbox: list[Any] = []
        self._inbox = bytearray()

    async def start(self, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        """Begin to send and to receive; call it once the worker has its end.

        Args:
            receive: called with each message.
            ended: called when the last message of a worker that died was received.
        """
        self.worker.close()
        self._receive, self._ended = receive, ended
        self._loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        await self._loop.create_unix_connection(lambda: self, sock=self._socket)

    def send(self, item: Any) -> None:
        """Send without waiting, whatever the worker is doing, together with what else is sent in this turn."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(item)

    def close(self) -> None:
        """Nothing is sent any more."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The event loop has the socket."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are no subclasses of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker is gone."""
        self._transport = None
        self._ended()

    def data_received(self, data: bytes) -> None:
        """Part of a message, or several."""
        self._inbox += data
        while (frame := _frame(self._inbox)) is not None:
            start, end = frame
            message = pickle.loads(self._inbox[start:end])
            del self._inbox[:end]
            self._receive(message)

    def _flush(self) -> None:
        items, self._outbox = self._outbox, []
        if self._transport is not None:  # else the worker is gone, and the server knows
            data = pickle.dumps(items, pickle.HIGHEST_PROTOCOL)
            length = len(data)
            self._transport.write(_SHORT.pack(length) if length <= _MOST_SHORT else _LONG.pack(-1, length))
            self._transport.write(data)


def _frame(data: bytearray) -> tuple[int, int] | None:
    """Where the first message in ``data`` begins and ends, if all of it is there."""
    if len(data) < _SHORT.size:
        return None
    (length,), start = _SHORT.unpack_from(data), _SHORT.size
    if length < 0:
        if len(data) < _LONG.size:
            return None
        (_, length), start = _LONG.unpack_from(data), _LONG.size
    return (start, start + length) if len(data) >= start + length else None


def take_all(queue: "SimpleQueue[Any]") -> list[Any]:
    """Everything in ``queue``, once there is anything."""
    items = [queue.get()]
    try:
        while True:
            items.append(queue.get_nowait())
    except Empty:
        return items
