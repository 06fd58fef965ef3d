"""Images that wait to be decoded and those that are: large ones, which take long, take what small ones leave."""

import time
from collections.abc import Callable, Iterable
from os import cpu_count
from threading import Condition, Lock

from gpt_serve.engine.engine import Prepared
from gpt_serve.engine.scheduler.jobs import FairQueue, Job, Shares
from gpt_serve.engine.scheduler.sharing import SharedImages, Turn

LARGE = 0.1
"""An image that is expected to take more seconds of decoding is left to threads that yield to all others, and to fewer
of them ..."""
SMALL_SEEN = 2.0
"""... if there was a smaller one within so many seconds."""


class Decoding:
    """What threads that decode take from. Whoever calls anything of it holds the lock.

    Args:
        lock: the scheduler's.
        shares: which task is next.

    Attributes:
        small: the small images that wait.
        large: the large ones.
        shared: those that are being decoded, by what is in them.
        begun: the jobs that a thread has, with the time at which it began.
    """

    def __init__(self, lock: Lock, shares: Shares) -> None:
        self.small, self.large = FairQueue(shares), FairQueue(shares)
        self.shared = SharedImages()
        self.begun: dict[Job, float] = {}
        self._for_small, self._for_large = Condition(lock), Condition(lock)
        self._small_at = float("-inf")  # when the last small image came

    @property
    def soon(self) -> bool:
        """Whether images are on their way that do not take long."""
        return bool(self.small) or any(job.work <= LARGE for job in self.begun)

    def push(self, job: Job) -> None:
        """``job`` waits; its ``work`` says how long decoding is expected to take."""
        if job.work > LARGE:
            self.large.push(job)
            self._for_large.notify()
        else:
            self.small.push(job)
            self._small_at = time.monotonic()
            self._for_small.notify()

    def next(self, large: bool, *, held: Callable[[], bool], closed: Callable[[], bool]) -> Turn | None:
        """Wait for a turn, of a large image or of a small one; None once it is ``closed``.

        Args:
            held: whether no image may be begun just now; `wake` says that this may have changed.
        """
        queue, condition = (self.large, self._for_large) if large else (self.small, self._for_small)
        while not closed():
            if queue and not held() and (not large or self._room_for_large()):
                turn = self.shared.begin(queue.pop()[0])
                if turn is None:
                    continue
                self.begun[turn.job] = time.monotonic()
                return turn
            condition.wait(SMALL_SEEN if queue and large else None)
        return None

    def followers(self, turn: Turn, prepared: Prepared | None) -> Iterable[Job]:
        """The jobs that wait for the same image, which is ``prepared`` if it could be decoded."""
        return self.shared.end(turn, prepared)

    def end(self, job: Job) -> None:
        """The thread that had ``job`` is done with it."""
        job.decoding = time.monotonic() - self.begun.pop(job)
        self._for_large.notify()  # one may have waited for this one's end

    def wake(self) -> None:
        """Have all threads look again."""
        self._for_small.notify_all()
        self._for_large.notify_all()

    def _room_for_large(self) -> bool:
        others = sum(job.work > LARGE for job in self.begun)
        alone = time.monotonic() - self._small_at > SMALL_SEEN
        return alone or others < max(1, (cpu_count() or 1) - 1)
