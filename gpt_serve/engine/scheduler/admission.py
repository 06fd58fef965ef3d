"""From a task's name to a pin: at once where the adapter is on the device, after a load in the background elsewhere."""

import time
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock, Thread

from gpt_serve.engine.bank import AdapterBank, Resident
from gpt_serve.engine.scheduler.jobs import Job, OnError, closed, expired, explained
from gpt_serve.errors import BankFull

LOADERS = 4  # they mostly wait, for the disk or for room in the bank


class Admission:
    """Takes a pin for each job and hands it on.

    Args:
        bank: where the adapters are.
        pinned: takes over a job that has its pin; called from any thread.
        on_error: told of every exception that is a bug.
    """

    def __init__(self, bank: AdapterBank, pinned: Callable[[Job], None], on_error: OnError) -> None:
        self.bank = bank
        self.on_error = on_error
        self._pinned = pinned
        self._lock = Lock()  # guards all below; nobody holds it while calling the bank or finishing a job
        self._to_load, self._to_expire = Condition(self._lock), Condition(self._lock)
        self._held: deque[Job] = deque()  # see `_take`
        self._cold: dict[str, deque[Job]] = {}  # by task, while its adapter is being loaded
        self._unbegun: deque[str] = deque()  # the tasks of `_cold` that no thread is loading yet
        self._starving = 0  # loads that wait for room
        self._closed = False
        for target in (*[self._load_loop] * LOADERS, self._sweep_loop):
            Thread(target=target, name="load", daemon=True).start()

    @property
    def loading(self) -> bool:
        """Whether an adapter is on its way, and not waiting for room."""
        return len(self._cold) > self._starving

    def admit(self, job: Job) -> None:
        """Pin and hand on ``job``, now or later, or finish it with the reason why not. Does not wait."""
        with self._lock:
            held = bool(self._starving or self._held) and not self._closed
            if held:
                self._held.append(job)
                self._to_expire.notify()
        if not held:
            self._look(job)

    def close(self) -> None:
        """Finish all that wait. The threads end by themselves: one may be waiting for the disk."""
        with self._lock:
            self._closed = True
            jobs = self._remove(lambda job: True)
            self._to_load.notify_all()
            self._to_expire.notify()
        for job in jobs:
            job.finish(closed())

    def _look(self, job: Job) -> None:
        try:
            job.resident = self.bank.try_take(job.task)
        except Exception as error:
            job.finish(explained(error, self.on_error))
            return
        if job.resident is not None:
            self._pinned(job)
            return
        with self._lock:
            lost = self._closed
            if not lost:
                if job.task not in self._cold:
                    self._cold[job.task] = deque()
                    self._unbegun.append(job.task)
                    self._to_load.notify()
                self._cold[job.task].append(job)
                self._to_expire.notify()
        if lost:
            job.finish(closed())

    def _load_loop(self) -> None:
        while True:
            with self._lock:
                self._to_load.wait_for(lambda: self._unbegun or self._closed)
                if self._closed:
                    return
                task = self._unbegun.popleft()
            while self._load(task):
                pass

    def _load(self, task: str) -> bool:
        """A pin for the first of those that wait for ``task``; whether there may be more of them."""
        with self._lock:
            waiting = self._cold[task]
            if not waiting:
                del self._cold[task]
                return False
            expires = waiting[-1].expires
        try:
            resident = self._take(task, expires)
        except Exception as error:
            self._fail(waiting, expires, error)
            return True
        with self._lock:
            job = waiting.popleft() if waiting else None
        if job is None:  # they have expired
            self.bank.release(resident)
        else:
            job.resident = resident
            self._pinned(job)
        return True

    def _fail(self, waiting: deque[Job], expires: float, error: Exception) -> None:
        if isinstance(error, BankFull) and time.monotonic() >= expires:
            self._sweep()  # others may have come meanwhile
            return
        known = explained(error, self.on_error)
        with self._lock:
            jobs = [waiting.popleft() for _ in range(len(waiting))]
        for job in jobs:
            job.finish(known.fresh())

    def _take(self, task: str, expires: float) -> Resident:
        """`AdapterBank.take`. While it waits for room, no other job gets a pin.

        Otherwise requests for the adapters that fill the bank, coming fast enough, would keep them pinned for ever.
        """
        try:
            return self.bank.take(task, 0)
        except BankFull:
            with self._lock:
                self._starving += 1
        try:
            return self.bank.take(task, max(0.0, expires - time.monotonic()))
        finally:
            with self._lock:
                self._starving -= 1
            self._admit_held()

    def _admit_held(self) -> None:
        while True:
            with self._lock:
                if self._starving or not self._held:
                    return
                job = self._held.popleft()
            self._look(job)

    def _sweep_loop(self) -> None:
        """Finish expired jobs on time, however long the disk takes."""
        while True:
            with self._lock:
                if self._closed:
                    return
                expiries = [job.expires for jobs in self._queues() for job in jobs]
                self._to_expire.wait(max(0.001, min(expiries) - time.monotonic()) if expiries else None)
            self._sweep()

    def _sweep(self) -> None:
        now = time.monotonic()
        with self._lock:
            jobs = self._remove(lambda job: job.expires <= now)
        for job in jobs:
            job.finish(expired())

    def _queues(self) -> list[deque[Job]]:
        return [self._held, *self._cold.values()]

    def _remove(self, condition: Callable[[Job], bool]) -> list[Job]:
        removed: list[Job] = []
        for jobs in self._queues():
            removed += filter(condition, jobs)
            kept = [job for job in jobs if not condition(job)]
            jobs.clear()
            jobs.extend(kept)
        return removed
