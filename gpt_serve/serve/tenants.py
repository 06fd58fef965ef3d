"""Who asks, and how much: keys become tenants, and tenants keep to their limits.

Each process that answers HTTP knows the keys; one counts what tenants have used, in its event loop. A thread watches
the file of keys, so that a slow disk holds nobody up.
"""

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from gpt_serve.errors import InvalidKey, InvalidRequest, RateLimited, TaskForbidden, UsageError
from gpt_serve.serve.keyfile import Tenant, digest_of, load_tenants

logger = logging.getLogger("gpt_serve.serve")

EVERYBODY = Tenant("everybody")
"""Who asks a server that wants no keys."""

OWNER = Tenant("owner")
"""Who has the server's single key."""

POLL = 1.0  # seconds between looks at the file


@dataclass
class _Usage:
    """What a tenant has used of its limits; ``tokens`` are answers that it may ask for now, below 0 if it owes some."""

    tokens: float
    at: float
    in_flight: int = 0


class Doorkeeper:
    """Knows the keys.

    Args:
        path: the file of keys, if there is one. It is read now, and again whenever it changes.
        key: the server's single key, if there is one; it opens everything.

    Raises:
        UsageError: the file cannot be used.
    """

    def __init__(self, path: Path | None = None, key: str | None = None) -> None:
        self._path = path
        self._own = {} if key is None else {digest_of(key): OWNER}
        self._signature = _signature(path) if path else None
        self._tenants = self._own | (_by_digest(path) if path else {})
        self._closed = threading.Event()
        if path:
            threading.Thread(target=self._watch, args=(path,), name="keys", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask."""
        return self._path is None and not self._own

    def tenant(self, key: str) -> Tenant:
        """Whose key this is; ``key`` is empty where none was given. Raises `InvalidKey`."""
        if self.is_open:
            return EVERYBODY
        found = self._tenants.get(digest_of(key)) if key else None
        if found is None:
            what = "this key is not known" if key else "a key is needed"
            raise InvalidKey(f"{what}: give yours in the X-API-Key header")
        return found

    def check_task(self, tenant: Tenant, task: str) -> None:
        """Raise `TaskForbidden`, whether there is such a task or not, unless ``tenant`` may ask it."""
        if not tenant.may_ask(task):
            raise TaskForbidden(f"this key does not open the task {task!r}: ask the server's operator for it")

    def close(self) -> None:
        """End the thread that watches the file."""
        self._closed.set()

    def _watch(self, path: Path) -> None:
        while not self._closed.wait(POLL):
            signature = _signature(path)
            if signature == self._signature:
                continue
            self._signature = signature
            try:
                self._tenants = self._own | _by_digest(path)
                logger.info("%s was read again: %d key(s)", path, len(self._tenants) - len(self._own))
            except UsageError as error:
                logger.error("the keys stay as they were: %s", error)


class Allowances:
    """What tenants have used of their limits."""

    def __init__(self) -> None:
        self._usage: dict[str, _Usage] = {}

    def count_request(self, tenant: Tenant) -> None:
        """Count a request as one answer (token bucket, a second's worth deep); see `take` for more than one.

        Raises:
            RateLimited: it is one too many.
        """
        if tenant.rate is None:
            return
        usage, now, most = self._used(tenant), time.monotonic(), max(1.0, tenant.rate)
        usage.tokens = min(most, usage.tokens + (now - usage.at) * tenant.rate)
        usage.at = now
        if usage.tokens < 1:
            seconds = (1 - usage.tokens) / tenant.rate
            raise RateLimited(f"more than {tenant.rate:g} answers a second: try again in {seconds:.1f} s", seconds)
        usage.tokens -= 1

    def take(self, tenant: Tenant, count: int) -> None:
        """``count`` answers, one for each image and task, are in flight until `give`.

        All but the first, which was counted before, count as requests: the next has to wait until they are paid for.

        Raises:
            InvalidRequest: a request must never ask for so many.
            RateLimited: they are too many just now.
        """
        usage, most = self._used(tenant), tenant.in_flight
        if most is not None and count > most:
            raise InvalidRequest(
                f"the request asks for {count} answers, and this key has {most} at once: ask for fewer"
            )
        if most is not None and usage.in_flight + count > most:
            raise RateLimited(f"more than {most} answers at once: wait for some before you send the next", 1.0)
        usage.in_flight += count
        if tenant.rate is not None:
            usage.tokens -= max(0, count - 1)

    def give(self, tenant: Tenant, count: int) -> None:
        """What `take` took."""
        self._used(tenant).in_flight -= count

    def _used(self, tenant: Tenant) -> _Usage:
        if tenant.name not in self._usage:
            self._usage[tenant.name] = _Usage(max(1.0, tenant.rate or 0.0), time.monotonic())
        return self._usage[tenant.name]


def _by_digest(path: Path) -> dict[str, Tenant]:
    return {key.sha256: tenant for tenant in load_tenants(path).values() for key in tenant.keys}


def _signature(path: Path) -> tuple[int, ...] | None:
    """Changes when the file does; None while it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev
