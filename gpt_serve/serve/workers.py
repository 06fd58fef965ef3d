"""All workers, one on each device: which of them answers, and who answers when one dies."""

import asyncio
from collections.abc import Sequence
from functools import partial

from gpt_serve.errors import NotReady
from gpt_serve.serve.messages import Answer, Item
from gpt_serve.serve.routing import order
from gpt_serve.serve.server import Server

ATTEMPTS = 2  # an image that a worker dies of may take one other along, but not all


class Workers:
    """Whoever answers items, see `gpt_serve.serve.messages.Asks`. Only the event loop's thread touches it.

    Each worker can load every adapter. A task is answered by one of them while that keeps up, and by more when it does
    not; see `gpt_serve.serve.routing`. A prediction changes nothing, so what a dead worker owed is asked of another.

    Args:
        servers: one for each worker.
        busy: a worker that owes so many answers is passed over while others owe fewer.
    """

    def __init__(self, servers: Sequence[Server], busy: int) -> None:
        self.servers = servers
        self.busy = busy
        self.state = servers[0].state

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        """Have ``item`` answered. The future raises `NotReady` when the workers died that were asked."""
        if len(self.servers) == 1:
            return self.servers[0].ask(item)
        outer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._attempt(item, outer, 1)
        return outer

    def fail_pending(self, reason: str) -> None:
        """Answer every pending request with `NotReady`."""
        for server in self.servers:
            server.fail_pending(reason)

    def _attempt(self, item: Item, outer: "asyncio.Future[Answer]", number: int) -> None:
        server = self._choose(item.task)
        inner = server.ask(item)
        inner.add_done_callback(partial(self._ended, item, outer, number, server))
        outer.add_done_callback(lambda _: inner.cancel())  # if it is not done

    def _choose(self, task: str) -> Server:
        ready = [server for server in self.servers if server.phase == "ready"] or self.servers
        named = {str(server.number): server for server in ready}
        best = order(task, {name: server.owed for name, server in named.items()}, self.busy)[0]
        return named[best]

    def _ended(
        self,
        item: Item,
        outer: "asyncio.Future[Answer]",
        number: int,
        server: Server,
        inner: "asyncio.Future[Answer]",
    ) -> None:
        error = None if inner.cancelled() else inner.exception()
        if inner.cancelled() or outer.done():
            return
        if error is None:
            outer.set_result(inner.result())
        elif isinstance(error, NotReady) and server.phase != "ready" and number < ATTEMPTS:
            self._attempt(item, outer, number + 1)
        else:
            outer.set_exception(error)
