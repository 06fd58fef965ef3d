"""A request on its way, and the queue in which tasks take turns."""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from gpt_serve.engine.bank import AdapterBank, Resident
from gpt_serve.engine.engine import Prediction, Row
from gpt_serve.errors import DeadlineExceeded, GPTServeError, NotReady

logger = logging.getLogger("gpt_serve.engine")

Result = Prediction | GPTServeError
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
        expires: ``time.monotonic()`` from which on nobody waits for the answer.
        work: an estimate of the seconds that its next step takes, for `FairQueue`.
        resident: pinned for this request; None before and after.
        row: what the forward pass takes, once it is decoded.
        decoding: seconds that decoding took.
        computing: seconds that its pass took.
    """

    def __init__(self, bank: AdapterBank, task: str, image: bytes, expires: float) -> None:
        self.bank = bank
        self.task = task
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

    def finish(self, result: Result) -> None:
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


class Pending(Future[Prediction]):
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


class Shares:
    """How many seconds of work each task has had. Not safe to share without a lock.

    A task's share counts from where those that are served now stand: who was idle has no claim to make up for it.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._now = 0.0

    def had(self, task: str) -> float:
        """The seconds of ``task``; less means that it is its turn."""
        return max(self._now, self._had.get(task, 0.0))

    def charge(self, task: str, seconds: float) -> None:
        """Add to what ``task`` has had; less than 0 gives back what was estimated too high."""
        self._had[task] = self.had(task) + seconds

    def turn(self, task: str) -> None:
        """It is the turn of ``task``, which has had the least of all that wait."""
        self._now = self.had(task)
        if len(self._had) > _MOST_SHARES:
            self._had = {task: had for task, had in self._had.items() if had > self._now}


class FairQueue:
    """First in, first out within a task; of the tasks, the one that has had the least work is next.

    Not safe to share without a lock.

    Args:
        shares: may be shared by several queues.
    """

    def __init__(self, shares: Shares | None = None) -> None:
        self._shares = shares or Shares()
        self._tasks: OrderedDict[str, deque[Job]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job) -> None:
        """Behind the others of its task."""
        self._tasks.setdefault(job.task, deque()).append(job)
        self._size += 1

    def peek(self) -> Job | None:
        """The job that is next."""
        return self._tasks[self._next()][0] if self._tasks else None

    def pop(self, most: int = 1) -> list[Job]:
        """Up to ``most`` jobs in turn, each charged to its task."""
        popped: list[Job] = []
        while self._tasks and len(popped) < most:
            task = self._next()
            jobs = self._tasks[task]
            popped.append(jobs.popleft())
            self._shares.turn(task)
            self._shares.charge(task, max(popped[-1].work, _LEAST_WORK))
            self._tasks.move_to_end(task)
            if not jobs:
                del self._tasks[task]
        self._size -= len(popped)
        return popped

    def _next(self) -> str:
        return min(self._tasks, key=self._shares.had)


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
