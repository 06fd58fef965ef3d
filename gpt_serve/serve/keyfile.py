"""The file of tenants and their keys: JSON, written by ``gpt-serve keys``, watched by the server.

::

    {"format": "gpt-serve-keys/1",
     "tenants": {
       "acme": {"tasks": ["flowers", "acme-*"], "rate": 20.0, "in_flight": 8,
                "keys": [{"id": "1f0c9a2b", "sha256": "<64 hex digits>", "created": "2026-01-31T12:00:00Z"}]}}}

It holds hashes only. A key is 256 random bits, which no search finds from its SHA-256: a slow hash would add nothing.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gpt_serve.errors import UsageError
from gpt_serve.files import locked, replacing
from gpt_serve.specs import TASK_PATTERN

FORMAT = "gpt-serve-keys/1"
_TASKS = re.compile(r"[a-z0-9._*?-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredKey:
    """What is kept of a key.

    Attributes:
        id: its name in lists: the first 8 hex digits of ``sha256``.
        sha256: its hash.
        created: UTC, ISO 8601.
    """

    id: str
    sha256: str
    created: str


@dataclass(frozen=True)
class Tenant:
    """Somebody with keys, and what they open.

    Attributes:
        name: spelt like a task's.
        tasks: patterns of the tasks that may be asked; ``*`` stands for any characters, ``?`` for one.
        rate: most answers a second, one for each image and task, on average; as many may come at once. None for no
            limit.
        in_flight: most answers that are on their way at once, one for each image and task; None for no limit.
        keys: each of them opens the same; there are two while one replaces another.
    """

    name: str
    tasks: tuple[str, ...] = ("*",)
    rate: float | None = None
    in_flight: int | None = None
    keys: tuple[StoredKey, ...] = field(default=(), repr=False)

    @property
    def is_limited(self) -> bool:
        """Whether what it uses need be counted."""
        return self.rate is not None or self.in_flight is not None

    def may_ask(self, task: str) -> bool:
        """Whether a pattern matches ``task``."""
        return any(fnmatchcase(task, pattern) for pattern in self.tasks)

    def __post_init__(self) -> None:
        if not TASK_PATTERN.fullmatch(self.name):
            raise UsageError(f"tenant {self.name!r}: use 1 to 64 of a-z 0-9 . _ - and start with a letter or digit")
        for pattern in self.tasks:
            if not _TASKS.fullmatch(pattern):
                raise UsageError(f"tenant {self.name}: {pattern!r} matches no task: use a-z 0-9 . _ - and * or ?")
        for name in ("rate", "in_flight"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"tenant {self.name}: {name} is {value}: it must be a number and more than 0")


Tenants = Mapping[str, Tenant]
"""Tenants by name."""


def digest_of(key: str) -> str:
    """The hash by which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def load_tenants(path: Path) -> Tenants:
    """The tenants in the file. Raises `UsageError` when there is none, or it is not such a file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: gpt-serve keys add TENANT --keys {path} makes it") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a file of keys: {error}") from error
    try:
        if content["format"] != FORMAT:
            raise UsageError(f"{path} has the format {content['format']!r}: this version reads {FORMAT}")
        return {name: _tenant(name, entry) for name, entry in content["tenants"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a file of keys: {type(error).__name__}: {error}") from error


def add_key(path: Path, name: str, **limits: Any) -> tuple[str, Tenant]:
    """Add a key for the tenant ``name``, who is added when new.

    Args:
        path: the file; made when it does not exist.
        name: the tenant's.
        limits: ``tasks``, ``rate`` and ``in_flight``, as far as they are to be set or changed.

    Returns:
        The key, which is kept nowhere, and the tenant.
    """
    key = f"gpt-serve-{secrets.token_urlsafe(32)}"
    digest = digest_of(key)
    stored = StoredKey(digest[:8], digest, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    with _changing(path, new=True) as tenants:
        tenant = tenants.get(name, Tenant(name))
        tenants[name] = tenant = replace(tenant, keys=(*tenant.keys, stored), **limits)
    return key, tenant


def revoke(path: Path, name: str) -> list[str]:
    """Take out the key of this id, or the tenant of this name with all keys.

    Returns:
        The ids of the keys that were taken out.

    Raises:
        UsageError: there is neither.
    """
    with _changing(path) as tenants:
        if name in tenants:
            return [key.id for key in tenants.pop(name).keys]
        for tenant in tenants.values():
            kept = tuple(key for key in tenant.keys if key.id != name)
            if len(kept) < len(tenant.keys):
                tenants[tenant.name] = replace(tenant, keys=kept)
                return [name]
    raise UsageError(f"{path} has no tenant or key {name!r}: gpt-serve keys list --keys {path} shows them")


@contextmanager
def _changing(path: Path, *, new: bool = False) -> Iterator[dict[str, Tenant]]:
    """The tenants, to be changed and then written; two commands at once wait for each other."""
    try:
        with locked(path.with_name(f".{path.name}.lock")):
            tenants = {} if new and not path.exists() else dict(load_tenants(path))
            yield tenants
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(_content(tenants.values()), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _content(tenants: Iterable[Tenant]) -> dict[str, Any]:
    entries = [asdict(tenant) for tenant in tenants]
    return {"format": FORMAT, "tenants": {entry.pop("name"): entry for entry in entries}}


def _tenant(name: str, entry: dict[str, Any]) -> Tenant:
    keys = tuple(StoredKey(**key) for key in entry["keys"])
    for key in keys:
        if not _DIGEST.fullmatch(key.sha256):
            raise ValueError(f"key {key.id} of {name} has no SHA-256")
    if not isinstance(entry["tasks"], list):
        raise ValueError(f"the tasks of {name} are no list")
    return Tenant(name, tuple(entry["tasks"]), entry["rate"], entry["in_flight"], keys)
