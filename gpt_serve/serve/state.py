"""What the routes know of the life of the server behind them. Only the event loop touches it, so it needs no lock."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gpt_serve.errors import GPTServeError, NotReady, Overloaded
from gpt_serve.specs import BackboneSpec

Owner = tuple[str, str]
Phase = Literal["loading", "ready", "restarting"]

_BEST_FIRST: tuple[Phase, ...] = ("ready", "restarting", "loading")
_WAITING = {
    "loading": "the backbone is being loaded: try again in a few seconds",
    "restarting": "the worker is being restarted: try again in a few seconds",
}


_REMEMBERED = 64  # times at which slots were given back, for the pace of that
_LONGEST_PAUSE = 60.0  # seconds; a queue that stands still tells nothing


@dataclass(eq=False)
class Slot:
    """The place of one image among those that the engine has or waits for; `ServerState.release` gives it back.

    Attributes:
        owner: whose it is: a tenant, which is empty where nobody needs a key, and its task.
        displaced: called when the slot goes to somebody with fewer of them.
    """

    owner: Owner
    displaced: Callable[[], None]


@dataclass
class ServerState:
    """The worker's phase, the admitted images, and whether and why the server is going down.

    Attributes:
        limit: most images admitted at once.
        phase: what the worker is doing; of several, what the best of them does.
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
    _phases: dict[int, Phase] = field(default_factory=dict)  # of each worker
    _slots: dict[Owner, dict[Slot, None]] = field(default_factory=dict)  # by owner, the oldest first
    _admitted: int = 0
    # When slots were given back since more than half of them are taken, after the time from which that is so.
    _released: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    @property
    def admitted(self) -> int:
        """Images that hold a slot: from the moment that their request is complete until it is answered."""
        return self._admitted

    def enter(self, worker: int, phase: Phase) -> None:
        """A worker enters a phase; all together are ready while one of them is."""
        self._phases[worker] = phase
        phases = self._phases.values()
        self.phase = next((best for best in _BEST_FIRST if best in phases), phase)

    @property
    def workers_ready(self) -> int:
        """How many workers hold the backbone now."""
        return sum(phase == "ready" for phase in self._phases.values())

    def check_ready(self) -> None:
        """Raise `NotReady` unless a request would be taken on."""
        if self.draining or self.fatal:
            raise NotReady("the server is shutting down: try another one, or again later")
        if self.phase != "ready":
            raise NotReady(_WAITING[self.phase])
        if self.store_fault:
            raise NotReady(self.store_fault)

    def admit(self, owner: Owner, displaced: Callable[[], None]) -> Slot:
        """Take a slot for ``owner``.

        When all are taken, the tenant with most of them gives one up, the newest of the task that has most, if that
        leaves it no worse off than ``owner``; so do the tasks of one tenant among each other. However many others are
        noisy, and however they share, a quiet one finds its place.

        Raises:
            NotReady: nothing is admitted now.
            Overloaded: all slots are taken, and ``owner`` has as many as anybody else.
        """
        self.check_ready()
        if self._admitted >= self.limit:
            self._displace(owner)
        if self._admitted <= self.limit // 2:
            self._released.clear()
            self._released.append(time.monotonic())
        slot = Slot(owner, displaced)
        self._slots.setdefault(owner, {})[slot] = None
        self._admitted += 1
        return slot

    def release(self, slot: Slot) -> None:
        """Give ``slot`` back; one that was displaced is gone already."""
        if slot in self._slots.get(slot.owner, {}):
            self._remove(slot)
            self._released.append(time.monotonic())

    def overloaded(self, reason: str) -> Overloaded:
        """An error that says for ``reason`` that there is no room, and when there is likely to be."""
        seconds = self._drain_seconds()
        return Overloaded(f"{reason}: try again in {'a second' if seconds <= 1 else f'{seconds:.0f} seconds'}", seconds)

    def _drain_seconds(self) -> float:
        """How long the slots that are taken now will last, at the pace at which slots were given back of late.

        Clients that come back then find the queue that they were turned away from gone, instead of still there.
        """
        if len(self._released) < 2:
            return 1.0
        each = (time.monotonic() - self._released[0]) / (len(self._released) - 1)
        return min(_LONGEST_PAUSE, max(1.0, each * self._admitted))

    def _remove(self, slot: Slot) -> None:
        slots = self._slots[slot.owner]
        del slots[slot]
        self._admitted -= 1
        if not slots:
            del self._slots[slot.owner]

    def _displace(self, owner: Owner) -> None:
        tenants: Counter[str] = Counter()
        for (tenant, _), slots in self._slots.items():
            tenants[tenant] += len(slots)
        largest, count = tenants.most_common(1)[0]
        if count <= tenants[owner[0]] + 1:  # then only its own tasks can make room
            largest = owner[0]
        tasks = {other: len(slots) for other, slots in self._slots.items() if other[0] == largest}
        most = max(tasks, key=lambda other: tasks[other], default=owner)
        if largest == owner[0] and tasks.get(most, 0) <= tasks.get(owner, 0) + 1:
            raise self.overloaded(f"{self.limit} images are already waiting")
        slot = next(reversed(self._slots[most]))
        self._remove(slot)
        slot.displaced()
