"""What the routes know of the life of the server behind them. Only the event loop touches it, so it needs no lock."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gpt_serve.errors import GPTServeError, NotReady, Overloaded
from gpt_serve.specs import BackboneSpec

Phase = Literal["loading", "ready", "restarting"]

_WAITING = {
    "loading": "the backbone is being loaded: try again in a few seconds",
    "restarting": "the worker is being restarted: try again in a few seconds",
}


@dataclass(eq=False)
class Slot:
    """The place of one image among those that the engine has or waits for; `ServerState.release` gives it back.

    Attributes:
        owner: whose it is: a task's name.
        displaced: called when the slot goes to somebody with fewer of them.
    """

    owner: str
    displaced: Callable[[], None]


@dataclass
class ServerState:
    """The worker's phase, the admitted images, and whether and why the server is going down.

    Attributes:
        limit: most images admitted at once.
        phase: what the worker is doing.
        spec: the backbone that a worker has loaded; None until the first one has.
        restarts: how many workers were started after the first.
        store_fault: what is wrong with the adapter folder as a whole; empty when nothing is.
        draining: a signal came; nothing new is admitted.
        fatal: why the server must end, if it must.
    """

    limit: int
    phase: Phase = "loading"
    spec: BackboneSpec | None = None
    restarts: int = 0
    store_fault: str = ""
    draining: bool = False
    fatal: GPTServeError | None = None
    _slots: dict[str, dict[Slot, None]] = field(default_factory=dict)  # by owner, the oldest first
    _admitted: int = 0

    @property
    def admitted(self) -> int:
        """Images that hold a slot: from the moment that their request is complete until it is answered."""
        return self._admitted

    def check_ready(self) -> None:
        """Raise `NotReady` unless a request would be taken on."""
        if self.draining or self.fatal:
            raise NotReady("the server is shutting down: try another one, or again later")
        if self.phase != "ready":
            raise NotReady(_WAITING[self.phase])
        if self.store_fault:
            raise NotReady(self.store_fault)

    def admit(self, owner: str, displaced: Callable[[], None]) -> Slot:
        """Take a slot for ``owner``.

        When all are taken, whoever has most of them gives the newest of those up, if that leaves it no worse off than
        ``owner``: however many others are noisy, and however they share, a quiet one finds its place.

        Raises:
            NotReady: nothing is admitted now.
            Overloaded: all slots are taken, and ``owner`` has as many as anybody else.
        """
        self.check_ready()
        if self._admitted >= self.limit:
            self._displace(owner)
        slot = Slot(owner, displaced)
        self._slots.setdefault(owner, {})[slot] = None
        self._admitted += 1
        return slot

    def release(self, slot: Slot) -> None:
        """Give ``slot`` back; one that was displaced is gone already."""
        slots = self._slots.get(slot.owner, {})
        if slot in slots:
            del slots[slot]
            self._admitted -= 1
            if not slots:
                del self._slots[slot.owner]

    def _displace(self, owner: str) -> None:
        most = max(self._slots, key=lambda other: len(self._slots[other]))
        if len(self._slots[most]) <= len(self._slots.get(owner, {})) + 1:
            raise Overloaded(f"{self.limit} images are already waiting: try again in a second")
        slot = next(reversed(self._slots[most]))
        self.release(slot)
        slot.displaced()
