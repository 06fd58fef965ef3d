"""Decoding and computing: what is pinned becomes rows, rows become batches, batches become answers."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from os import cpu_count
from threading import Barrier, Condition, Lock, Thread

import torch

from gpt_serve.engine.engine import Engine, Prediction, Row
from gpt_serve.engine.scheduler.admission import Admission
from gpt_serve.engine.scheduler.jobs import Batch, FairQueue, Job, OnError, Result, closed, expired, explained, guarded
from gpt_serve.errors import GPTServeError


class Scheduler:
    """Runs an engine for requests that come one by one, from any thread.

    Args:
        engine: nobody else computes with it meanwhile.
        max_batch: most rows in a forward pass.
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
        self.batch_timeout = batch_timeout
        self.overlap = overlap
        self.on_batch = on_batch
        self.on_error = guarded(on_error)
        self._lock = Lock()  # guards all below; nobody holds it while calling the engine or finishing a job
        self._to_decode, self._to_compute = Condition(self._lock), Condition(self._lock)
        self._undecoded, self._ready = FairQueue(), FairQueue()
        self._ready_since = 0.0
        self._decoding = 0  # threads at work
        self._computing = self._closed = False
        self._row_seconds = 0.0  # of the last pass
        self._admission = Admission(engine.bank, self._pinned, self.on_error)
        self._threads = self._start()

    def submit(self, task: str, image: bytes, expires: float) -> "Future[Prediction]":
        """Answer ``image`` with ``task``'s adapter as it is now. Returns at once; costs one ``stat``.

        Args:
            expires: ``time.monotonic()`` from which on nobody waits for the answer.

        Returns:
            What will hold the prediction, or raise the request's `GPTServeError`. It cannot be cancelled.
        """
        job = Job(self.engine.bank, task, image, expires)
        self._admission.admit(job)
        return job.future

    def close(self) -> None:
        """Answer what waits with `NotReady`, finish the pass that runs, and end the threads."""
        with self._lock:
            self._closed = True
            jobs = [job for queue in (self._undecoded, self._ready) for job in queue.pop(len(queue))]
            self._to_decode.notify_all()
            self._to_compute.notify_all()
        self._admission.close()
        for job in jobs:
            job.finish(closed())
        for thread in self._threads:
            thread.join()

    def _start(self) -> list[Thread]:
        count, setting = cpu_count() or 1, torch.get_num_threads()
        begun = Barrier(count + 1)
        threads = [Thread(target=self._decode_loop, args=(begun,), name="decode", daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        begun.wait()
        torch.set_num_threads(setting)  # the decoders changed the default
        threads.append(Thread(target=self._compute_loop, name="compute", daemon=True))
        threads[-1].start()
        return threads

    def _pinned(self, job: Job) -> None:
        with self._lock:
            lost = self._closed
            if not lost:
                self._undecoded.push(job)
                self._to_decode.notify()
        if lost:
            job.finish(closed())

    def _decode_loop(self, begun: Barrier) -> None:
        # PyTorch gives each thread that scales images an OpenMP team of its own: one thread is team enough. A thread
        # keeps the setting that it finds at its first use.
        torch.set_num_threads(1)
        torch.get_num_threads()
        begun.wait()
        while (job := self._next_to_decode()) is not None:
            result = self._prepare(job)
            with self._lock:
                self._decoding -= 1
                lost = self._closed
                if isinstance(result, Row) and not lost:
                    job.row = result
                    self._ready_since = self._ready_since if self._ready else time.monotonic()
                    self._ready.push(job)
                self._to_compute.notify()
            if isinstance(result, GPTServeError):
                job.finish(result)
            elif lost:
                job.finish(closed())

    def _next_to_decode(self) -> Job | None:
        with self._lock:
            while not self._closed and (not self._undecoded or (self._computing and not self.overlap)):
                self._to_decode.wait()
            if self._closed:
                return None
            self._decoding += 1
            return self._undecoded.pop()[0]

    def _prepare(self, job: Job) -> Row | GPTServeError:
        if job.expires <= time.monotonic():
            return expired()
        assert job.resident is not None
        try:
            return self.engine.prepare(job.resident, job.image)
        except Exception as error:
            return explained(error, self.on_error)

    def _compute_loop(self) -> None:
        while (jobs := self._next_batch()) is not None:
            now = time.monotonic()
            live = [job for job in jobs if job.expires > now]
            results = self._compute(live)
            seconds = time.monotonic() - now
            with self._lock:
                self._computing = False
                self._to_decode.notify_all()
                if not self.overlap:
                    self._ready_since = time.monotonic()  # nothing could become ready meanwhile
            for job in jobs:
                if job not in live:
                    job.finish(expired())
            if live:
                self._row_seconds = seconds / len(live)
                self._tell(Batch(seconds, tuple(now - job.submitted for job in live)))
            for job, result in zip(live, results, strict=True):
                job.finish(result)

    def _tell(self, batch: Batch) -> None:
        """Whoever counts may fail, and must not take the thread that computes along."""
        try:
            self.on_batch(batch)
        except Exception as error:
            self.on_error(error)

    def _next_batch(self) -> list[Job] | None:
        """One or more rows, once it is time for them."""
        with self._lock:
            while not self._closed:
                pause = self._pause()
                if pause == 0:
                    self._computing = True
                    jobs = self._ready.pop(self.max_batch)
                    self._ready_since = time.monotonic()
                    return jobs
                self._to_compute.wait(pause)
            return None

    def _pause(self) -> float | None:
        """Seconds until the next batch may begin; None when there is nothing to begin with."""
        if not self._ready:
            return None
        decoding = bool(self._decoding or self._undecoded)
        if len(self._ready) >= self.max_batch or not (decoding or self._admission.loading):
            return 0.0
        patience = self.batch_timeout
        if decoding and not self.overlap:
            # The cores are at work meanwhile. Waiting for as long as the pass over what is there would take at most
            # doubles the time of an answer, and a pass over more rows costs less for each.
            patience = max(patience, self._row_seconds * len(self._ready))
        return max(0.0, self._ready_since + patience - time.monotonic())

    def _compute(self, jobs: list[Job]) -> list[Result]:
        """A result for each; should the batch break the engine, each alone, so that only the culprit fails."""
        try:
            return list(self.engine.compute([job.row for job in jobs if job.row is not None])) if jobs else []
        except Exception as error:
            known = explained(error, self.on_error)
            return [known] if len(jobs) == 1 else [self._compute([job])[0] for job in jobs]
