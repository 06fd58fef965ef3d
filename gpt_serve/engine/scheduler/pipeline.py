"""Decoding and computing: what is pinned becomes rows, rows become batches, batches become answers."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from os import cpu_count
from threading import Barrier, Condition, Lock, Thread

import torch

from gpt_serve.engine.engine import Answer, Engine, Row, Success
from gpt_serve.engine.priority import yield_to_others
from gpt_serve.engine.scheduler.admission import Admission
from gpt_serve.engine.scheduler.decoding import Decoding
from gpt_serve.engine.scheduler.jobs import (
    Batch,
    FairQueue,
    Job,
    OnError,
    Pending,
    Shares,
    closed,
    expired,
    explained,
    guarded,
)
from gpt_serve.engine.scheduler.pace import Load, Pace, decode_seconds
from gpt_serve.engine.scheduler.sharing import ReadyQueue, Turn
from gpt_serve.errors import GPTServeError, UsageError
from gpt_serve.images.headers import pixels

ROWS = 8
"""Most answers of a pass by its ``max_batch``: heads are cheap, but a thousand of them take time."""


class Scheduler:
    """Runs an engine for requests that come one by one, from any thread.

    Args:
        engine: nobody else computes with it meanwhile.
        max_batch: most rows that a block computes together. Tasks of one image that have no block of their own are one
            row; `ROWS` says how many of them may be.
        batch_timeout: seconds that the first row of a batch waits for others that are on their way.
        overlap: decode while a pass runs: right where it runs on a GPU. On a CPU the two take turns, each with all
            cores.
        on_batch: told of every pass, before its requests are answered.
        on_error: told of every exception that is a bug or a broken device.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        batch_timeout: float,
        overlap: bool,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        on_error: OnError = lambda error: None,
    ) -> None:
        self.engine = engine
        self.max_batch = max_batch
        self.max_rows = ROWS * max_batch
        self.batch_timeout = batch_timeout
        self.overlap = overlap
        self.on_batch = on_batch
        self.on_error = guarded(on_error)
        self._lock = Lock()  # guards all below; nobody holds it while calling the engine or finishing a job
        self._to_compute, self._to_compute_slow = Condition(self._lock), Condition(self._lock)
        self._shares = Shares()
        self._decoding = Decoding(self._lock, self._shares)
        self._ready, self._slow = ReadyQueue(self._shares), FairQueue(self._shares)
        self._ready_since = 0.0
        self._computing: float | None = None  # since when
        self._computing_slow: float | None = None
        self._closed = False
        self._pace = Pace()
        self._admission = Admission(engine.bank, self._pinned, self.on_error)
        self._threads = self._start()

    def submit(self, task: str, image: bytes, expires: float, tenant: str = "") -> "Future[Success]":
        """Answer ``image`` with ``task``'s adapter as it is now. Returns at once.

        Args:
            task: its name.
            image: the bytes of an image file. Nothing else that `Engine.predict` takes: they tell what decoding costs.
            expires: ``time.monotonic()`` from which on nobody waits for the answer.
            tenant: who asks. Tenants take turns, and so do the tasks of each.

        Returns:
            What will hold the prediction, or raise the request's `GPTServeError`. It cannot be cancelled, but see
            `abandon`.

        Raises:
            UsageError: ``image`` is no bytes.
        """
        if not isinstance(image, bytes):
            raise UsageError(f"a scheduler takes the bytes of an image file, not {type(image).__name__}")
        job = Job(self.engine.bank, task, image, expires, tenant)
        self._admission.admit(job)
        return job.future

    def abandon(self, future: "Future[Success]") -> None:
        """Nobody waits any more for what `submit` returned: spare its work, if it is not under way."""
        assert isinstance(future, Pending)
        future.job.abandon()
        self._admission.sweep_soon()

    def busy(self) -> float:
        """For how many seconds the longest pass or decoding that is under way has been so; 0 if there is none.

        Each of them comes to an end in bounded time, so a large number means that something hangs.
        """
        with self._lock:
            passes = [since for since in (self._computing, self._computing_slow) if since is not None]
            began = [*self._decoding.begun.values(), *passes]
        return time.monotonic() - min(began) if began else 0.0

    def close(self) -> None:
        """Answer what waits with `NotReady`, finish the pass that runs, and end the threads."""
        with self._lock:
            self._closed = True
            jobs = [job for queue in self._queues() for job in queue.pop(len(queue))]
            self._decoding.wake()
            self._to_compute.notify_all()
            self._to_compute_slow.notify_all()
        self._admission.close()
        for job in jobs:
            job.finish(closed())
        for thread in self._threads:
            thread.join()

    def _queues(self) -> tuple[FairQueue, ...]:
        return self._decoding.small, self._decoding.large, self._ready, self._slow

    def _start(self) -> list[Thread]:
        count, setting = cpu_count() or 1, torch.get_num_threads()
        begun = Barrier(2 * count + 1)
        kinds = [("decode", False)] * count + [("decode-large", True)] * count
        threads = [
            Thread(target=self._decode_loop, args=(begun, large), name=name, daemon=True) for name, large in kinds
        ]
        for thread in threads:
            thread.start()
        begun.wait()
        torch.set_num_threads(setting)  # the decoders changed the default
        threads.append(Thread(target=self._compute_loop, name="compute", daemon=True))
        threads.append(Thread(target=self._slow_loop, name="compute-slow", daemon=True))
        for thread in threads[-2:]:
            thread.start()
        return threads

    def _pinned(self, job: Job) -> None:
        job.work = decode_seconds(pixels(job.image), len(job.image))
        hash(job.image)  # takes time by the megabyte, but once: not while others wait for the lock
        with self._lock:
            lost = self._closed
            if not lost:
                self._decoding.push(job)
        if lost:
            job.finish(closed())

    def _decode_loop(self, begun: Barrier, large: bool) -> None:
        if large:
            yield_to_others()
        # PyTorch gives each thread that scales images an OpenMP team of its own: one thread is team enough. A thread
        # keeps the setting that it finds at its first use.
        torch.set_num_threads(1)
        torch.get_num_threads()
        begun.wait()
        while (turn := self._next_to_decode(large)) is not None:
            result = self._prepare(turn)
            with self._lock:
                followers = self._decoding.followers(turn, result.prepared if isinstance(result, Row) else None)
            self._decoded(turn.job, [(turn.job, result), *((job, self._alike(job, result)) for job in followers)])

    def _decoded(self, leader: Job, results: list[tuple[Job, Row | GPTServeError]]) -> None:
        """Hand on all jobs about an image at once, so that they meet in a batch."""
        with self._lock:
            self._decoding.end(leader)
            lost = self._closed
            for job, result in results:
                self._shares.charge(job.owner, job.decoding - job.work)
                if isinstance(result, Row) and not lost:
                    self._push_ready(job, result)
            self._to_compute.notify()
        for job, result in results:
            if isinstance(result, GPTServeError):
                job.finish(result)
            elif lost:
                job.finish(closed())

    def _push_ready(self, job: Job, row: Row) -> None:
        job.row = row
        job.work = self._pace.row(row.work)
        if self._pace.is_slow(job.work) and not self.overlap:
            # A pass cannot be interrupted: beside it, yielding to it, this row holds nobody up. A GPU has one queue.
            self._slow.push(job)
            self._to_compute_slow.notify()
        else:
            self._ready_since = self._ready_since if self._ready else time.monotonic()
            self._ready.push(job)

    def _next_to_decode(self, large: bool) -> Turn | None:
        with self._lock:
            return self._decoding.next(
                large,
                held=lambda: self._computing is not None and not self.overlap,
                closed=lambda: self._closed,
            )

    def _prepare(self, turn: Turn) -> Row | GPTServeError:
        if turn.key is None:
            return expired()
        resident = turn.job.resident
        assert resident is not None
        try:
            if turn.prepared is not None:
                return self.engine.row(resident, turn.prepared)
            return self.engine.prepare(resident, turn.key[0])
        except Exception as error:
            return explained(error, self.on_error)

    def _alike(self, job: Job, result: Row | GPTServeError) -> Row | GPTServeError:
        """What becomes of a job whose image is that of ``result``."""
        if isinstance(result, GPTServeError):
            return result.fresh()
        assert job.resident is not None
        return self.engine.row(job.resident, result.prepared)

    def _compute_loop(self) -> None:
        while (jobs := self._next_batch()) is not None:
            finish = self._computed(jobs)
            with self._lock:
                self._computing = None
                self._decoding.wake()
                if not self.overlap:
                    self._ready_since = time.monotonic()  # nothing could become ready meanwhile
            finish()

    def _slow_loop(self) -> None:
        """Compute slow rows one by one."""
        yield_to_others()
        while (job := self._next_slow()) is not None:
            finish = self._computed([job])
            with self._lock:
                self._computing_slow = None
            finish()

    def _next_slow(self) -> Job | None:
        with self._lock:
            while not self._closed:
                if self._slow:
                    self._computing_slow = time.monotonic()
                    return self._slow.pop()[0]
                self._to_compute_slow.wait()
            return None

    def _computed(self, jobs: list[Job]) -> Callable[[], None]:
        """Compute and account for ``jobs``; what is given back finishes them."""
        now = time.monotonic()
        live = [job for job in jobs if job.expires > now]
        results = self._compute(live)
        seconds = time.monotonic() - now
        with self._lock:
            self._account(jobs, live, seconds)

        def finish() -> None:
            for job in jobs:
                if job not in live:
                    job.finish(expired())
            if live:
                self._tell(Batch(seconds, tuple(now - job.submitted for job in live)))
            for job, result in zip(live, results, strict=True):
                job.computing = seconds
                job.finish(result)

        return finish

    def _tell(self, batch: Batch) -> None:
        """Whoever counts may fail, and must not take the thread that computes along."""
        try:
            self.on_batch(batch)
        except Exception as error:
            self.on_error(error)

    def _account(self, jobs: list[Job], live: list[Job], seconds: float) -> None:
        """Charge a pass to its tasks instead of what it was expected to take, and learn from it."""
        load = Load(job.row for job in live if job.row is not None)
        if live:
            self._pace.learn(load, seconds)
        for job in jobs:
            share = load.share(job.row) if job in live and job.row is not None else 0.0
            self._shares.charge(job.owner, seconds * share - job.work)

    def _next_batch(self) -> list[Job] | None:
        """One or more rows, once it is time for them."""
        with self._lock:
            while not self._closed:
                pause = self._pause()
                if pause == 0:
                    self._computing = self._ready_since = time.monotonic()
                    return self._fitting()
                self._to_compute.wait(pause)
            return None

    def _fitting(self) -> list[Job]:
        """The next rows: no more than ``max_batch`` allows, nor than a pass of bounded time holds."""
        jobs: list[Job] = []
        load = Load()
        while load.rows < self.max_rows and (job := self._ready.peek()) is not None:
            assert job.row is not None
            load.add(job.row)
            if jobs and not (load.computed <= self.max_batch and self._pace.fits(load)):
                break
            jobs += self._ready.pop()
        return jobs

    def _pause(self) -> float | None:
        """Seconds until the next batch may begin; None when there is nothing to begin with."""
        if not self._ready:
            return None
        decoding = self._decoding.soon
        full = self._ready.images >= self.max_batch or len(self._ready) >= self.max_rows
        if full or not (decoding or self._admission.loading):
            return 0.0
        patience = self.batch_timeout
        if (decoding or self._admission.looking) and not self.overlap:
            # The cores are at work meanwhile. Waiting for as long as the pass over what is there would take at most
            # doubles the time of an answer, and a pass over more rows costs less for each.
            patience = max(patience, self._pace.row_seconds * self._ready.images)
        return max(0.0, self._ready_since + patience - time.monotonic())

    def _compute(self, jobs: list[Job]) -> list[Answer]:
        """A result for each; should the batch break the engine, each alone, so that only the culprit fails."""
        try:
            return self.engine.compute([job.row for job in jobs if job.row is not None]) if jobs else []
        except Exception as error:
            known = explained(error, self.on_error)
            return [known] if len(jobs) == 1 else [self._compute([job])[0] for job in jobs]
