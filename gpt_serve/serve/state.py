"""What the routes know of the life of the server behind them. Only the event loop touches it, so it needs no lock."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from gpt_serve.errors import GPTServeError, NotReady, Overloaded
from gpt_serve.specs import BackboneSpec

Phase = Literal["loading", "ready", "restarting"]

_WAITING = {
    "loading": "the backbone is being loaded: try again in a few seconds",
    "restarting": "the worker is being restarted: try again in a few seconds",
}


@dataclass
class ServerState:
    """The worker's phase, the admitted requests, and whether and why the server is going down.

    Attributes:
        limit: most requests admitted at once.
        phase: what the worker is doing.
        spec: the backbone that a worker has loaded; None until the first one has.
        admitted: requests that hold a slot: from the first header until the worker is done with them, so that a
            client that left or gave up cannot make the queue grow.
        by_task: how many of them each task has; at most three quarters of the slots, unless these are few.
        restarts: how many workers were started after the first.
        draining: a signal came; nothing new is admitted.
        fatal: why the server must end, if it must.
    """

    limit: int
    phase: Phase = "loading"
    spec: BackboneSpec | None = None
    admitted: int = 0
    by_task: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    draining: bool = False
    fatal: GPTServeError | None = None

    def check_ready(self) -> None:
        """Raise `NotReady` unless a request would be taken on."""
        if self.draining or self.fatal:
            raise NotReady("the server is shutting down: try another one, or again later")
        if self.phase != "ready":
            raise NotReady(_WAITING[self.phase])

    def admit(self) -> None:
        """Take a slot; `release` gives it back. Raises `NotReady` or `Overloaded`."""
        self.check_ready()
        if self.admitted >= self.limit:
            raise Overloaded(f"{self.limit} requests are already waiting: try again in a second")
        self.admitted += 1

    def assign(self, task: str) -> None:
        """Say whose the slot is. Raises `Overloaded` when the task has its share, so that others find some free."""
        share = self.limit - (self.limit // 4 if self.limit >= 8 else 0)
        if self.by_task[task] >= share:
            raise Overloaded(f"{share} requests for this task are already waiting: try again in a second")
        self.by_task[task] += 1

    def release(self, task: str = "") -> None:
        """Give a slot back, assigned to ``task`` if to any."""
        self.admitted -= 1
        if task:
            self.by_task[task] -= 1
            if not self.by_task[task]:
                del self.by_task[task]
