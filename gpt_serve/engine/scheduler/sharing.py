"""Jobs about the same image: it is decoded once for all that are under way together, whoever sent it."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from gpt_serve.engine.engine import Prepared
from gpt_serve.engine.scheduler.jobs import FairQueue, Job, Shares
from gpt_serve.specs import Preprocess

Key = tuple[bytes, Preprocess, bool]
"""A file, byte by byte, how it is prepared, and whether for a mask: equal for jobs that share an image."""


@dataclass(frozen=True, eq=False)
class Turn:
    """What a thread that decodes is to do next.

    Attributes:
        job: whose image it is.
        key: None when nobody waits for the answer any more.
        prepared: the image as a row takes it, if a job under way has it already.
    """

    job: Job
    key: Key | None
    prepared: Prepared | None = None


class SharedImages:
    """Which images are being decoded, and which are there. Not safe to share between threads without a lock."""

    def __init__(self) -> None:
        self._following: dict[Key, list[Job]] = {}
        self._decoded: WeakValueDictionary[Key, Prepared] = WeakValueDictionary()  # as long as a row has them

    def begin(self, job: Job) -> Turn | None:
        """The turn of ``job``; None if another job's image is the same and being decoded: see `end`."""
        image = job.image  # looked at before the deadline: one that is abandoned loses the deadline first
        if job.expires <= time.monotonic():
            return Turn(job, None)
        assert job.resident is not None
        key = image, job.resident.preprocess, job.resident.masks
        if key in self._following:
            self._following[key].append(job)
            return None
        self._following[key] = []
        return Turn(job, key, self._decoded.get(key))

    def end(self, turn: Turn, prepared: Prepared | None) -> Iterable[Job]:
        """The jobs that have followed since `begin`; ``prepared`` is their image, if it could be decoded."""
        if turn.key is None:
            return ()
        if prepared is not None:
            self._decoded[turn.key] = prepared
        return self._following.pop(turn.key)


class ReadyQueue(FairQueue):
    """A queue of jobs that have their row."""

    def __init__(self, shares: Shares | None = None) -> None:
        super().__init__(shares)
        self._rows: Counter[int] = Counter()  # by the identity of their image

    @property
    def images(self) -> int:
        """How many images the jobs are about."""
        return len(self._rows)

    def push(self, job: Job) -> None:
        """Behind the others of its task."""
        super().push(job)
        self._rows[_image_of(job)] += 1

    def pop(self, most: int = 1) -> list[Job]:
        """Up to ``most`` jobs in turn, each charged to its task."""
        jobs = super().pop(most)
        for image in map(_image_of, jobs):
            self._rows[image] -= 1
            if not self._rows[image]:
                del self._rows[image]
        return jobs


def _image_of(job: Job) -> int:
    assert job.row is not None
    return id(job.row.image)
