"""What travels between processes: plain values, which pickle without torch.

Between the server and whoever runs the engine::

    Asked ->                     an Item with its number, or that nobody waits for that number any more
          <- Answered            an Answer for each number, or a Failure that says which error it was
          <- Ready or Failure    once, when the worker has loaded the backbone or cannot
          <- Beat                every second from then on

Between an HTTP process and the desk, where there are several of them::

    Call, NoLonger ->
          <- Returned            for each call with a number
          <- Standing            at the beginning, and when it changes
          <- Stop                at the end
"""

import asyncio
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from gpt_serve.errors import GPTServeError, TurnedAway, revive
from gpt_serve.serve.state import Phase, ServerState
from gpt_serve.specs import BackboneSpec

MaskFormat = Literal["png", "rle", "none"]
"""A palette PNG, COCO's run lengths, or no mask beside the shares of the classes."""


@dataclass(frozen=True, slots=True)
class Format:
    """What an answer is to look like.

    Attributes:
        top_k: how many labels it lists at most; None where the client did not say.
        mask: of a segmentation task; None where the client did not say. Others have none, whatever it says.
        picture: whether a mask is to be the whole response, as a PNG file.
        strict: whether ``top_k`` is refused for a mask, which has all classes; not where several tasks are asked,
            because it is for others of them.
    """

    top_k: int | None = None
    mask: MaskFormat | None = None
    picture: bool = False
    strict: bool = True


@dataclass(frozen=True, slots=True)
class Item:
    """One image for one task.

    Attributes:
        task: a well-formed name; whether such a task is stored shows when the item is answered.
        image: the bytes of the image file, as they came.
        format: of the answer.
        expires: ``time.monotonic()`` from which on nobody waits for the answer.
        tenant: who asks; empty where nobody needs a key. Tenants take turns, and so do the tasks of each.
        attention: whether a picture of where the adapter looks is wanted instead of a prediction.
    """

    task: str
    image: bytes
    format: Format
    expires: float
    tenant: str = ""
    attention: bool = False


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
        seconds: of a `TurnedAway`, after which trying again may help.
    """

    name: str
    message: str
    seconds: float = 1.0

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """What of ``error`` travels."""
        return cls(type(error).__name__, str(error), error.seconds if isinstance(error, TurnedAway) else 1.0)

    def error(self) -> GPTServeError:
        """The error, as it was raised in the other process."""
        error = revive(self.name, self.message)
        if isinstance(error, TurnedAway):
            error.seconds = self.seconds
        return error


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


@dataclass(frozen=True, slots=True)
class Call:
    """What an HTTP process says to the desk: a method of `gpt_serve.serve.desk.Desk`, or ``beat``, a sign of life.

    Attributes:
        number: comes back with the result; None where none is waited for.
        name: of the method.
        arguments: of the call.
    """

    number: int | None
    name: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class NoLonger:
    """Nobody waits any more for the result of the call ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Returned:
    """The result of a call, or a `Failure` that says which error it raised."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Stop:
    """An HTTP process is to answer what it has, and end."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What an HTTP process has to know of `gpt_serve.serve.state.ServerState`; the fields are the same."""

    phase: Phase
    spec: BackboneSpec | None
    store_fault: str
    draining: bool

    @classmethod
    def of(cls, state: ServerState) -> "Standing":
        """Of the state as it is now. A server that must end takes on no more than one that drains."""
        return cls(state.phase, state.spec, state.store_fault, state.draining or state.fatal is not None)

    def apply(self, state: ServerState) -> None:
        """Make ``state`` say the same."""
        for own in fields(self):
            setattr(state, own.name, getattr(self, own.name))


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
