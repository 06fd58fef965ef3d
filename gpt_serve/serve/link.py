"""Two pipes between the server and one worker: items one way, messages the other, as many to a write as there are.

LitServe's own queues live in a process of their own, through which each upload and each answer would pass on its way.
A pipe ends when either process does, so neither waits for the other in vain, and a new worker gets new pipes: nothing
that a dead one left behind can reach it.
"""

from collections.abc import Callable
from multiprocessing import Pipe
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any


class Link:
    """The server's side.

    Attributes:
        requests: the worker's end of one pipe; each `recv` gives a list of what was sent, one item or more.
        messages: the worker's end of the other, for what it has to say.
    """

    def __init__(self) -> None:
        self.requests, self._requests = Pipe(duplex=False)
        self._messages, self.messages = Pipe(duplex=False)
        self._outbox: SimpleQueue[Any] = SimpleQueue()

    def start(self, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        """Begin to send and to receive; call it once the worker has its ends of the pipes.

        Args:
            receive: called with each message, in a thread of the link's own.
            ended: called when the last message of a worker that died was received.
        """
        self.requests.close()
        self.messages.close()
        Thread(target=self._send_loop, name="requests", daemon=True).start()
        Thread(target=self._receive_loop, args=(receive, ended), name="messages", daemon=True).start()

    def send(self, item: Any) -> None:
        """Send without waiting, whatever the worker is doing."""
        self._outbox.put(item)

    def close(self) -> None:
        """End the thread that sends; the one that receives ends with the worker."""
        self._outbox.put(None)

    def _send_loop(self) -> None:
        try:
            while None not in (items := take_all(self._outbox)):
                self._requests.send(items)
        except OSError:  # the worker is gone, and the server knows
            pass
        self._requests.close()

    def _receive_loop(self, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        try:
            while True:
                receive(self._messages.recv())
        except (EOFError, OSError):
            ended()


def take_all(queue: "SimpleQueue[Any]") -> list[Any]:
    """Everything in ``queue``, once there is anything."""
    items = [queue.get()]
    try:
        while True:
            items.append(queue.get_nowait())
    except Empty:
        return items
