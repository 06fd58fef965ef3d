"""What travels between the HTTP side and whoever runs the engine: plain values, which pickle without torch.

::

    Asked ->                     an Item with its number, or that nobody waits for that number any more
          <- Answered            an Answer for each number, or a Failure that says which error it was
          <- Ready or Failure    once, when the worker has loaded the backbone or cannot
          <- Beat                every second from then on
"""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from gpt_serve.errors import GPTServeError, revive
from gpt_serve.specs import BackboneSpec


@dataclass(frozen=True, slots=True)
class Item:
    """One image for one task.

    Attributes:
        task: a well-formed name; whether such a task is stored shows when the item is answered.
        image: the bytes of the image file, as they came.
        top_k: how many labels the answer lists at most.
        expires: ``time.monotonic()`` from which on nobody waits for the answer.
    """

    task: str
    image: bytes
    top_k: int
    expires: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What the server sends to a worker.

    Attributes:
        number: counts the items of a server; the reply comes with it.
        item: None if whoever waited for the reply to ``number`` has left, so that its work can be saved.
    """

    number: int
    item: Item | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client gets for one `Item`.

    Attributes:
        task: the item's.
        revision: the revision of the adapter that computed it.
        content: the body of the response, of the type ``media_type``.
        media_type: JSON, unless the client asked for a picture.
        seconds: how long the item was ``queueing``, ``decoding`` and ``computing``, for the access log; empty where
            nobody measured it.
    """

    task: str
    revision: str
    content: bytes
    media_type: str = "application/json"
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way: exceptions do not pickle well, and carry tracebacks.

    Attributes:
        name: of the error's class.
        message: what ``str`` of the error says.
    """

    name: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """What of ``error`` travels."""
        return cls(type(error).__name__, str(error))

    def error(self) -> GPTServeError:
        """The error, as it was raised in the other process."""
        return revive(self.name, self.message)


@dataclass(frozen=True, slots=True)
class Passed:
    """One forward pass, for the metrics.

    Attributes:
        seconds: how long it took.
        waits: for each image in it, the seconds from its arrival at the worker to the beginning of the pass.
    """

    seconds: float
    waits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """The worker's numbers at the time of a message.

    Attributes:
        passes: those since the last message, so that each is counted once.
        bank: the fields of `gpt_serve.engine.bank.BankStats` as they are now.
    """

    bank: dict[str, float]
    passes: list[Passed] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded the backbone that ``spec`` describes."""

    spec: BackboneSpec
    stats: Stats


@dataclass(frozen=True, slots=True)
class Answered:
    """Everything that the worker had answered when it sent this, by the number that came with each item."""

    replies: list[tuple[int, Answer | Failure]]
    stats: Stats


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, every second.

    Attributes:
        busy: for how many seconds the longest piece of work now under way (one pass, one image to decode) has been
            under way; 0 when there is none. A long queue does not count: only what does not come to an end.
    """

    busy: float


Message = Ready | Failure | Answered | Beat
"""What a worker sends. A `Failure` means that it could not load, and ends."""


class Asks(Protocol):
    """Whoever answers items: a worker process behind a pipe, a deployment of Ray Serve, a stub of a test."""

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        """Have ``item`` answered; called in the event loop, and does not wait.

        The future raises the item's `GPTServeError` instead where there is one: `UnknownTask`, `UndecodableImage`,
        `NotReady` when the engine's process died, and so on. When nobody waits for it any more it is cancelled, and
        what has not been begun by then need not be.
        """
        ...
