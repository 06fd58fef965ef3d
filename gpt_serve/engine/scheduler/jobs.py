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
        resident: pinned for this request; None before and after.
        row: what the forward pass takes, once it is decoded.
    """

    def __init__(self, bank: AdapterBank, task: str, image: bytes, expires: float) -> None:
        self.bank = bank
        self.task = task
        self.image = image
        self.expires = expires
        self.submitted = time.monotonic()
        self.resident: Resident | None = None
        self.row: Row | None = None
        self.future: Future[Prediction] = Future()
        self.future.set_running_or_notify_cancel()  # nobody can cancel it any more

    def finish(self, result: Result) -> None:
        """Give the pin back and answer. Runs the future's callbacks: never call it with a lock held."""
        resident, self.resident, self.row = self.resident, None, None
        if resident is not None:
            self.bank.release(resident)
        if isinstance(result, GPTServeError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class FairQueue:
    """First in, first out within a task; the tasks take turns. Not safe to share without a lock."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, deque[Job]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job) -> None:
        """Behind the others of its task."""
        self._tasks.setdefault(job.task, deque()).append(job)
        self._size += 1

    def pop(self, most: int = 1) -> list[Job]:
        """Up to ``most`` jobs, the first of each task in turn."""
        popped: list[Job] = []
        while self._tasks and len(popped) < most:
            task, jobs = next(iter(self._tasks.items()))
            popped.append(jobs.popleft())
            self._tasks.move_to_end(task)
            if not jobs:
                del self._tasks[task]
        self._size -= len(popped)
        return popped


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
