"""From a task's name to a pin: at once where the adapter is on the device, after a load in the background elsewhere."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Lock, Thread

from gpt_serve.engine.bank import AdapterBank, Resident
from gpt_serve.engine.scheduler.jobs import Job, OnError, closed, expired, explained
from gpt_serve.errors import BankFull

LOADERS = 4  # they mostly wait, for the disk or for room in the bank
LOOKERS = 32  # a look at a file that never answers holds one of them


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
        self._unseen: dict[str, deque[Job]] = {}  # by task, until somebody has looked whether its adapter is there
        self._lookers = ThreadPoolExecutor(LOOKERS, thread_name_prefix="look")
        self._held: deque[Job] = deque()  # see `_take`
        self._cold: dict[str, deque[Job]] = {}  # by task, while its adapter is being loaded
        self._unbegun: deque[str] = deque()  # the tasks of `_cold` that no thread is loading yet
        self._starving = 0  # loads that wait for room
        self._closed = False
        for target in (*[self._load_loop] * LOADERS, self._sweep_loop):
            Thread(target=target, name="load", daemon=True).start()

    @property
    def loading(self) -> bool:
        """Whether a job or its adapter is on its way, and not waiting for room."""
        return len(self._cold) > self._starving or self.looking

    @property
    def looking(self) -> bool:
        """Whether it is not yet known of some job if its adapter is there; mostly for microseconds."""
        return any(list(self._unseen.values()))

    def admit(self, job: Job) -> None:
        """Pin and hand on ``job``, now or later, or finish it with the reason why not. Does not wait."""
        with self._lock:
            lost = self._closed
            if not lost:
                self._line_up(job)
        if lost:
            job.finish(closed())

    def sweep_soon(self) -> None:
        """Have expired jobs finished, because some are that were not expected to be."""
        with self._lock:
            self._to_expire.notify()

    def close(self) -> None:
        """Finish all that wait. The threads end by themselves: one may be waiting for the disk."""
        with self._lock:
            self._closed = True
            jobs = self._remove(lambda job: True)
            self._to_load.notify_all()
            self._to_expire.notify()
            self._lookers.shutdown(wait=False)
        for job in jobs:
            job.finish(closed())

    def _line_up(self, job: Job) -> None:
        """Behind the others of its task, for each of which somebody looks whether the adapter is there."""
        if job.task not in self._unseen:
            self._unseen[job.task] = deque()
            self._lookers.submit(self._look_loop, job.task)
        self._unseen[job.task].append(job)
        self._to_expire.notify()

    def _look_loop(self, task: str) -> None:
        """Look for all that wait for ``task``. The disk may take for ever: until it answers, the jobs stay in line."""
        while True:
            with self._lock:
                waiting = self._unseen[task]
                if self._starving:
                    self._held.extend(waiting)
                    waiting.clear()
                if not waiting:
                    del self._unseen[task]
                    return
            try:
                found: Resident | None | Exception = self.bank.try_take(task)
            except Exception as error:
                found = error
            with self._lock:
                job = waiting.popleft() if waiting else None
            self._seen(job, found)

    def _seen(self, job: Job | None, found: Resident | None | Exception) -> None:
        if job is None:  # it has expired
            if isinstance(found, Resident):
                self.bank.release(found)
        elif isinstance(found, Exception):
            job.finish(explained(found, self.on_error))
        elif found is None:
            self._load_for(job)
        else:
            job.resident = found
            self._pinned(job)

    def _load_for(self, job: Job) -> None:
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
        with self._lock:
            if not self._starving and not self._closed:
                while self._held:
                    self._line_up(self._held.popleft())

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
        return [self._held, *self._unseen.values(), *self._cold.values()]

    def _remove(self, condition: Callable[[Job], bool]) -> list[Job]:
        removed: list[Job] = []
        for jobs in self._queues():
            removed += filter(condition, jobs)
            kept = [job for job in jobs if not condition(job)]
            jobs.clear()
            jobs.extend(kept)
        return removed
