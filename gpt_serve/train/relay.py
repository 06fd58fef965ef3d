"""A run that is reported where it was asked for, not where it trains."""

import time
from collections.abc import Callable
from typing import Any

from gpt_serve.train.data.views import Unreadable
from gpt_serve.train.job import Reporter
from gpt_serve.train.loop import EpochRecord

Send = Callable[[str, tuple[Any, ...]], object]
"""Takes the name of a method of `Reporter`, or ``tick``, and its arguments; they arrive in order."""

INTERVAL = 0.5  # seconds between two messages about progress


class Relay:
    """A `Reporter` that sends all it is told to a `Replay`. What comes with every image or step is summed up."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sent = 0.0
        self._count = 0  # images read, or trained on, that were not told of yet

    def scanning(self, total: int, what: str = "checking images") -> Callable[[], object]:
        """See `Reporter`."""
        self._tell("scanning", total, what)
        return lambda: self._progress(1, lambda count: ("tick", (count,)))

    def batch(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        """See `Reporter`."""
        self._progress(images, lambda count: ("batch", (epoch, loss, accuracy, count)))

    def unreadable(self, images: list[Unreadable]) -> None:
        """See `Reporter`."""
        self._tell("unreadable", images)

    def notice(self, text: str) -> None:
        """See `Reporter`."""
        self._tell("notice", text)

    def epoch(self, record: EpochRecord) -> None:
        """See `Reporter`."""
        self._tell("epoch", record)

    def training(self, images: int, first_epoch: int, epochs: int) -> None:
        """See `Reporter`."""
        self._tell("training", images, first_epoch, epochs)

    def _tell(self, name: str, *arguments: Any) -> None:
        if name in ("scanning", "training"):  # a bar of its own: what the last one lacks is of no use any more
            self._count = 0
        self._send(name, arguments)

    def _progress(self, count: int, message: Callable[[int], tuple[str, tuple[Any, ...]]]) -> None:
        self._count += count
        if time.monotonic() - self._sent >= INTERVAL:
            self._send(*message(self._count))
            self._sent, self._count = time.monotonic(), 0


class Replay:
    """Tells ``reporter`` what a `Relay` has sent."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._tick: Callable[[], object] = lambda: None

    def tell(self, name: str, arguments: tuple[Any, ...]) -> None:
        """One message."""
        if name == "tick":
            for _ in range(*arguments):
                self._tick()
        elif name == "scanning":
            self._tick = self._reporter.scanning(*arguments)
        else:
            getattr(self._reporter, name)(*arguments)
