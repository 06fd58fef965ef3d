"""A request on its way, and the queue in which tasks take turns."""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from gpt_serve.engine.bank import AdapterBank, Resident
from gpt_serve.engine.engine import Answer, Row, Success
from gpt_serve.errors import DeadlineExceeded, GPTServeError, NotReady

logger = logging.getLogger("gpt_serve.engine")

Owner = tuple[str, str]
"""Whose a job is: a tenant, which is empty where nobody needs a key, and a task."""
OnError = Callable[[Exception], None]

_LEAST_WORK = 1e-6  # seconds: tasks whose work is not known yet take turns
_MOST_SHARES = 4096


@dataclass(frozen=True)
class Batch:
    """One forward pass, for whoever counts.

    Attributes:
        seconds: that it took.
        waits: seconds of each row from `Scheduler.submit` to its beginning.
    """

    seconds: float
    waits: tuple[float, ...]


class Job:
    """A request. Exactly one queue or thread has it at a time, and finishes it or hands it on.

    Attributes:
        owner: whose turn it takes.
        expires: ``time.monotonic()`` from which on nobody waits for the answer.
        work: an estimate of the seconds that its next step takes, for `FairQueue`.
        resident: pinned for this request; None before and after.
        row: what the forward pass takes, once it is decoded.
        decoding: seconds that decoding took.
        computing: seconds that its pass took.
    """

    def __init__(self, bank: AdapterBank, task: str, image: bytes, expires: float, tenant: str = "") -> None:
        self.bank = bank
        self.task = task
        self.owner: Owner = tenant, task
        self.image = image
        self.expires = expires
        self.submitted = time.monotonic()
        self.work = 0.0
        self.decoding = self.computing = 0.0
        self.resident: Resident | None = None
        self.row: Row | None = None
        self.future = Pending(self)
        self.future.set_running_or_notify_cancel()  # nobody can cancel it any more

    def abandon(self) -> None:
        """Nobody waits any more: the image's memory is free at once, and the job ends at its next step."""
        self.expires = 0.0
        self.image = b""

    def finish(self, result: Answer) -> None:
        """Give the pin back and answer. Runs the future's callbacks: never call it with a lock held."""
        resident, self.resident, self.row = self.resident, None, None
        if resident is not None:
            self.bank.release(resident)
        queueing = time.monotonic() - self.submitted - self.decoding - self.computing
        self.future.seconds = {"queueing": queueing, "decoding": self.decoding, "computing": self.computing}
        if isinstance(result, GPTServeError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Pending(Future[Success]):
    """What will hold the answer of ``job``.

    Attributes:
        job: whose answer it is.
        seconds: once it is done, how long the job was ``queueing``, ``decoding`` and ``computing``; together they are
            the time from its submission.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.seconds: dict[str, float] = {}


class _Level:
    """How many seconds of work each of several names has had.

    A share counts from where those that are served now stand: who was idle has no claim to make up for it.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._now = 0.0

    def had(self, name: str) -> float:
        return max(self._now, self._had.get(name, 0.0))

    def charge(self, name: str, seconds: float) -> None:
        self._had[name] = self.had(name) + seconds

    def turn(self, name: str) -> None:
        self._now = self.had(name)
        if len(self._had) > _MOST_SHARES:
            self._had = {name: had for name, had in self._had.items() if had > self._now}


class Shares:
    """How many seconds of work each tenant has had, and of these each of its tasks.

    Not safe to share without a lock.
    """

    def __init__(self) -> None:
        self._tenants = _Level()
        self._tasks: dict[str, _Level] = {}

    def had(self, owner: Owner) -> tuple[float, float]:
        """The seconds of the tenant, and of its task; less means that it is its turn."""
        tenant, task = owner
        return self._tenants.had(tenant), self._of(tenant).had(task)

    def charge(self, owner: Owner, seconds: float) -> None:
        """Add to what ``owner`` has had; less than 0 gives back what was estimated too high."""
        tenant, task = owner
        self._tenants.charge(tenant, seconds)
        self._of(tenant).charge(task, seconds)

    def turn(self, owner: Owner) -> None:
        """It is the turn of ``owner``, which has had the least of all that wait."""
        tenant, task = owner
        self._tenants.turn(tenant)
        self._of(tenant).turn(task)

    def _of(self, tenant: str) -> _Level:
        return self._tasks.setdefault(tenant, _Level())


class FairQueue:
    """First in, first out for each task of a tenant; the tenant that has had the least work is next, with that of its
    tasks that has.

    Not safe to share without a lock.

    Args:
        shares: may be shared by several queues.
    """

    def __init__(self, shares: Shares | None = None) -> None:
        self._shares = shares or Shares()
        self._owners: OrderedDict[Owner, deque[Job]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job) -> None:
        """Behind the others of its owner."""
        self._owners.setdefault(job.owner, deque()).append(job)
        self._size += 1

    def peek(self) -> Job | None:
        """The job that is next."""
        return self._owners[self._next()][0] if self._owners else None

    def pop(self, most: int = 1) -> list[Job]:
        """Up to ``most`` jobs in turn, each charged to its owner."""
        popped: list[Job] = []
        while self._owners and len(popped) < most:
            owner = self._next()
            jobs = self._owners[owner]
            popped.append(jobs.popleft())
            self._shares.turn(owner)
            self._shares.charge(owner, max(popped[-1].work, _LEAST_WORK))
            self._owners.move_to_end(owner)
            if not jobs:
                del self._owners[owner]
        self._size -= len(popped)
        return popped

    def _next(self) -> Owner:
        return min(self._owners, key=self._shares.had)


def guarded(on_error: OnError) -> OnError:
    """``on_error`` for threads that must live on, whatever it does: what it raises itself is logged."""

    def tell(error: Exception) -> None:
        try:
            on_error(error)
        except Exception:
            logger.exception("whoever is told of errors failed")

    return tell


def explained(error: Exception, on_error: OnError) -> GPTServeError:
    """``error`` for the user; one that nobody raised on purpose is reported first."""
    if isinstance(error, GPTServeError):
        return error
    on_error(error)
    return GPTServeError(f"{type(error).__name__} in the engine")


def expired() -> GPTServeError:
    """Each answer gets an error of its own, because what is raised collects a traceback."""
    return DeadlineExceeded("the deadline passed while the request was queued")


def closed() -> GPTServeError:
    return NotReady("the scheduler is closed: ask another one")
