"""A store elsewhere, as near as a folder: its listing is remembered, its files are fetched once and kept on the disk.

Requests never wait for a listing. One is made every ``poll_seconds`` for all processes of a machine together, in a
thread; a task that is in use and was replaced goes on with its old revision until the new one has been fetched and
verified. While the store cannot be reached, answers go on from what is there::

    each process of a machine -> catalogue and files -> one listing per interval, one fetch per version -> the store
"""

import errno
import hashlib
import json
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from gpt_serve.adapters.bucket import Bucket, Listed
from gpt_serve.adapters.cache import AdapterCache
from gpt_serve.adapters.source import FILE_NAME, Signature
from gpt_serve.errors import InvalidAdapter, UsageError
from gpt_serve.files import cache_folder, replacing

logger = logging.getLogger("gpt_serve.adapters")

FETCHES = 8  # at once
LOOKS = 4  # at the catalogue of this machine per interval, so that all its processes are at most a quarter behind


class Mirror:
    """An `AdapterSource` of what a bucket holds. Lists it once when it is made.

    Answers follow a change at most ``(1 + 1 / LOOKS) * poll_seconds`` after it, plus the time of a listing and, if the
    task is in use, of a fetch.

    Args:
        bucket: what is mirrored.
        folder: of the catalogue and the files; processes with the same folder share them.
        poll_seconds: from one listing to the next.

    Raises:
        UsageError: the store cannot be listed, and nobody on this machine has done so before.
    """

    def __init__(self, bucket: Bucket, folder: Path, poll_seconds: float) -> None:
        if poll_seconds <= 0:
            raise UsageError(f"listing a store every {poll_seconds:g} seconds cannot work: use more than 0")
        self.bucket = bucket
        self.folder = folder
        self.poll_seconds = poll_seconds
        self.cache = AdapterCache(folder)
        self._lock = threading.Lock()  # guards the three below
        self._current: dict[str, Listed] = {}
        self._failing: dict[str, str] = {}  # what is wrong with a new version, by task; "" for the store itself
        self._poller: threading.Thread | None = None
        self._ended = threading.Event()
        self._begin()

    @classmethod
    def of(cls, address: str, poll_seconds: float) -> "Mirror":
        """Open the mirror of an address, with its place in the user's cache."""
        bucket = Bucket(address)
        try:
            folder = cache_folder() / "adapters" / hashlib.sha256(bucket.address.encode()).hexdigest()[:16]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"adapters of {address} cannot be kept ({error.filename}: {error.strerror}): let XDG_CACHE_HOME name "
                "another place"
            ) from error
        return cls(bucket, folder, poll_seconds)

    def __str__(self) -> str:
        return self.bucket.address

    def close(self) -> None:
        """End the polling; what is known stays."""
        self._ended.set()

    def names(self) -> list[str]:
        """Return the names of the tasks in the last listing."""
        return list(self._current)

    def signature(self, task: str) -> Signature:
        """Return the version in the last listing: no call leaves the process."""
        self._watch()
        listed = self._listed(task)
        return Signature(listed.size, listed.version)

    def read(self, task: str) -> tuple[bytes, Signature]:
        """From the disk if the version is there, else fetched and kept. Clients may see an error's text, not where."""
        listed = self._listed(task)
        try:
            return self._fetched(task, listed), Signature(listed.size, listed.version)
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.warning("adapter %r cannot be fetched: %s", task, error.strerror)
            raise OSError(errno.EIO, "its store does not give it now, try again later") from error

    def prepare(self, tasks: Sequence[str]) -> None:
        """Fetch what is not on the disk, several at once; trouble is met again, and told, by `read`."""
        missing = [task for task in tasks if (listed := self._current.get(task)) and not self._has(task, listed)]
        with ThreadPoolExecutor(FETCHES) as pool:
            for future in [pool.submit(self.read, task) for task in missing]:
                future.exception()

    def write(self, task: str, data: bytes) -> None:
        """Put the file and its digest there; other machines see it with their next listing."""
        self.bucket.write(task, {FILE_NAME: data})
        self._take(self._list())

    def refresh(self) -> None:
        """Take over what is there now, or what another process of this machine has listed less than an interval ago.

        Raises nothing: trouble is logged once, until it is over.
        """
        try:
            listed = self._shared()
        except OSError as error:
            self._note("", f"adapters go on from what is there: {error.strerror}")
            return
        self._note("", None)
        self._take(listed)

    def _begin(self) -> None:
        try:
            self._current = self._list()
        except OSError as error:
            kept = self._kept()
            if kept is None:
                raise UsageError(f"the adapter store cannot be listed: {error.strerror}") from error
            self._current = kept[1]
            self._note("", f"adapters are those of the last listing on this machine: {error.strerror}")

    def _watch(self) -> None:
        """Begin to poll, at the first sign that somebody waits for changes."""
        with self._lock:
            if self._poller is None:
                arguments = (weakref.ref(self), self._ended, self.poll_seconds / LOOKS)
                self._poller = threading.Thread(target=_poll, args=arguments, name="poll adapters", daemon=True)
                self._poller.start()

    def _listed(self, task: str) -> Listed:
        listed = self._current.get(task)
        if listed is None:
            raise FileNotFoundError(errno.ENOENT, "not in the listing")
        return listed

    def _has(self, task: str, listed: Listed) -> bool:
        return self.cache.has(task, listed.version)

    def _fetched(self, task: str, listed: Listed) -> bytes:
        data = self.cache.get(task, listed.version)
        if data is None:
            data = self.bucket.read(task, listed)
            self.cache.put(task, listed.version, data)
        return data

    def _shared(self) -> dict[str, Listed]:
        """The catalogue of this machine, listed anew if it is older than the interval: by one process for all."""
        with FileLock(self.folder / "catalogue.lock"):
            kept = self._kept()
            if kept is not None and 0 <= time.time() - kept[0] < self.poll_seconds:
                return kept[1]
            return self._list()

    def _list(self) -> dict[str, Listed]:
        listed = self.bucket.list()
        content = {"listed": time.time(), "tasks": {task: asdict(entry) for task, entry in listed.items()}}
        with replacing(self._catalogue) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        return listed

    def _kept(self) -> tuple[float, dict[str, Listed]] | None:
        """When the catalogue was listed (seconds since the epoch), and it; None when there is none that can be read."""
        try:
            content = json.loads(self._catalogue.read_text(encoding="utf-8"))
            return content["listed"], {task: Listed(**entry) for task, entry in content["tasks"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def _catalogue(self) -> Path:
        return self.folder / "catalogue.json"

    def _take(self, listed: dict[str, Listed]) -> None:
        """Answer from ``listed`` from now on, except where a task in use has a new version that cannot be had."""
        before = self._current
        if listed == before:
            return
        used = [
            task for task in listed if task in before and listed[task] != before[task] and self._has(task, before[task])
        ]
        with ThreadPoolExecutor(FETCHES) as pool:
            troubles = dict(zip(used, pool.map(lambda task: self._trouble(task, listed[task]), used), strict=True))
        for task, trouble in troubles.items():
            self._note(task, trouble)
        kept = {task: before[task] for task, trouble in troubles.items() if trouble is not None}
        self._current = listed | kept
        self.cache.prune({task: entry.version for task, entry in self._current.items()})

    def _trouble(self, task: str, listed: Listed) -> str | None:
        """Why the new version cannot be used yet."""
        try:
            self._fetched(task, listed)
        except OSError as error:
            return f"adapter {task!r} stays as it was: {error.strerror}"
        except InvalidAdapter as error:
            return f"adapter {task!r} stays as it was: {error}"
        return None

    def _note(self, what: str, trouble: str | None) -> None:
        """Log trouble when it begins or changes, and its end."""
        with self._lock:
            known = self._failing.pop(what, None)
            if trouble is not None:
                self._failing[what] = trouble
        if trouble is not None and trouble != known:
            logger.warning("%s", trouble)
        elif trouble is None and known is not None:
            logger.info("over: %s", known)


def _poll(mirror: "weakref.ref[Mirror]", ended: threading.Event, pause: float) -> None:
    """Refresh until nobody holds the mirror any more."""
    while not ended.wait(pause):
        held = mirror()
        if held is None:
            return
        try:
            held.refresh()
        except Exception:  # a bug must not end the polling without a word
            logger.exception("looking for new adapters failed")
        del held
