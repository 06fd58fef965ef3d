"""Where all that requests may take is counted, in one process: slots for images, and what tenants have used."""

import asyncio
from functools import partial

from gpt_serve.errors import GPTServeError, NotReady, Overloaded
from gpt_serve.serve.messages import Answer, Asks, Item
from gpt_serve.serve.state import ServerState, Slot

DISPLACED = "the place in the queue went to somebody with fewer images waiting"


class Gate:
    """Whoever answers items, behind a limit on how many they are at once; see `gpt_serve.serve.messages.Asks`.

    Args:
        asks: who answers.
        state: has the slots. An item holds one until it is answered or nobody waits for it any more.
    """

    def __init__(self, asks: Asks, state: ServerState) -> None:
        self.asks = asks
        self.state = state

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        """Have ``item`` answered.

        The future raises `NotReady` or `Overloaded` where there is no slot for it, or where its slot went to somebody
        with fewer of them.
        """
        outer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            slot = self.state.admit((item.tenant, item.task), partial(self._displace, outer))
        except (NotReady, Overloaded) as error:
            return failed(error)
        try:
            inner = self.asks.ask(item)
        except BaseException:
            self.state.release(slot)
            raise
        outer.add_done_callback(partial(self._given, slot, inner))
        inner.add_done_callback(partial(_passed_on, outer))
        return outer

    def _displace(self, outer: "asyncio.Future[Answer]") -> None:
        if not outer.done():
            outer.set_exception(self.state.overloaded(DISPLACED))

    def _given(self, slot: Slot, inner: "asyncio.Future[Answer]", outer: "asyncio.Future[Answer]") -> None:
        """``outer`` is done, whatever with: answered, displaced, or because nobody waits any more."""
        self.state.release(slot)
        inner.cancel()  # if it is not done
        if not outer.cancelled():
            outer.exception()  # when nobody waits for the answer any more, nobody need hear of it


def failed(error: GPTServeError) -> "asyncio.Future[Answer]":
    """An answer that was refused before anybody was asked."""
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    future.exception()  # nobody need hear of it
    return future


def _passed_on(outer: "asyncio.Future[Answer]", inner: "asyncio.Future[Answer]") -> None:
    if inner.cancelled():
        return
    error = inner.exception()
    if outer.done():
        return
    if error is None:
        outer.set_result(inner.result())
    else:
        outer.set_exception(error)
