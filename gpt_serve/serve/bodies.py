"""Request bodies: read in bounded time and memory, whatever their senders do."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gpt_serve.errors import ImageTooLarge, InvalidRequest, Overloaded
from gpt_serve.serve.problems import HTTPError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

GRACE_SECONDS = 10.0  # for any body to arrive
MIN_RATE = 8 * 2**10  # bytes a second beyond that
AT_ONCE = 32  # bodies of the largest size that may be in memory unfinished


class ClientLeft(Exception):
    """Nobody is there any more to take an answer."""


class Bodies:
    """The bodies that are being read, and the memory that they share.

    A body that is still arriving holds no slot, so slow senders take none from others. Where all unfinished bodies
    together need more than their share of memory, the largest of them is given up.

    Args:
        most_bytes: of one body.
        seconds: most that reading one may take, however steadily it comes.
    """

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.budget = AT_ONCE * most_bytes
        self._held = 0
        self._reading: dict[_Reading, None] = {}

    async def read(self, receive: Receive, declared: str | None) -> bytes:
        """The whole body of a request.

        Args:
            receive: ASGI's.
            declared: what the header Content-Length says, if there is one: too much of it is refused early.

        Raises:
            ImageTooLarge: more than ``most_bytes``.
            Overloaded: the memory was needed for others.
            HTTPError: 408, it took too long.
            ClientLeft: before the end.
        """
        if declared is not None and declared.isdecimal() and int(declared[:20]) > self.most_bytes:
            raise self._too_large()
        message = await self._first(receive)
        if not message.get("more_body"):
            return bytes(self._checked(message["body"]))
        reading = _Reading(bytearray(self._checked(message["body"])))
        self._reading[reading] = None
        self._held += len(reading.body)
        try:
            return await self._rest(receive, reading)
        finally:
            del self._reading[reading]
            self._held -= len(reading.body)

    async def _first(self, receive: Receive) -> MutableMapping[str, Any]:
        try:
            async with asyncio.timeout(min(GRACE_SECONDS, self.seconds)):
                return _body(await receive())
        except TimeoutError:
            raise self._too_slow() from None

    async def _rest(self, receive: Receive, reading: "_Reading") -> bytes:
        began, body = asyncio.get_running_loop().time(), reading.body
        try:
            async with asyncio.timeout(None) as reading.timeout:
                more = True
                while more:
                    allowed = min(self.seconds, GRACE_SECONDS + len(body) / MIN_RATE)
                    reading.timeout.reschedule(began + allowed)
                    message = _body(await receive())
                    body += message["body"]
                    self._held += len(message["body"])
                    self._checked(body)
                    self._make_room()
                    more = message.get("more_body", False)
        except TimeoutError:
            raise self._no_room() if reading.given_up else self._too_slow() from None
        return bytes(body)

    def _make_room(self) -> None:
        while self._held > self.budget and (kept := [other for other in self._reading if not other.given_up]):
            largest = max(kept, key=lambda other: len(other.body))
            largest.give_up()
            self._held -= len(largest.body)
            largest.body.clear()

    def _checked(self, body: bytes | bytearray) -> bytes | bytearray:
        if len(body) > self.most_bytes:
            raise self._too_large()
        return body

    def _too_large(self) -> ImageTooLarge:
        return ImageTooLarge(f"the body has more than {self.most_bytes} bytes: send a smaller image")

    def _too_slow(self) -> HTTPError:
        return HTTPError(408, "the body did not arrive in time: send it faster, or send a smaller image")

    def _no_room(self) -> Overloaded:
        return Overloaded("too many large bodies are being sent at once: try again in a second")


class _Reading:
    """A body on its way."""

    def __init__(self, body: bytearray) -> None:
        self.body = body
        self.given_up = False
        self.timeout: asyncio.Timeout

    def give_up(self) -> None:
        """Have `Bodies.read` stop waiting for the rest."""
        self.given_up = True
        self.timeout.reschedule(0)


def _body(message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if message["type"] == "http.disconnect":
        raise ClientLeft
    if "body" not in message:
        raise InvalidRequest("the request has no body")
    return message
