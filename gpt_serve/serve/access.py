"""What is known of each request when it ends, and the access log: a JSON object a line.

Lines are written by a thread of their own, because a disk may be slow or hang. When it does, lines are dropped rather
than kept without bound, and the server's log says how many.
"""

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

from gpt_serve.errors import UsageError

logger = logging.getLogger("gpt_serve.serve")

MOST_WAITING = 10_000  # lines
KEY = "gpt_serve.record"
"""Where a request's `Record` is in its ASGI scope."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """What became of one image for one task.

    Attributes:
        task: empty unless there is such a task.
        revision: of the adapter that answered; empty where none did.
        status: of HTTP, of this answer by itself.
    """

    task: str
    revision: str
    status: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the access log."""
        return {"task": self.task, "revision": self.revision, "status": self.status}


@dataclass
class Record:
    """One request. The routes fill in what they learn.

    Attributes:
        request_id: the caller's, where its ``X-Request-ID`` is one that a log line can hold, else a new one.
        method: of HTTP.
        path: what was asked for, without the query.
        client: the other end's address.
        began: ``time.monotonic()`` of the first header.
        at: the same in UTC.
        tenant: whose key it was; empty where none was needed or none was right.
        images: how many were asked about.
        answers: one for each image and task, in order; empty when the request was refused as a whole.
        seconds: how long parts of it took: ``reading`` the body; for the slowest answer ``queueing``, ``decoding`` and
            ``computing``.
    """

    request_id: str
    method: str
    path: str
    client: str
    began: float = field(default_factory=time.monotonic)
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    tenant: str = ""
    images: int = 0
    answers: list[AnswerRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, scope: Mapping[str, Any]) -> "Record":
        """The record of a request that begins."""
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        client = scope.get("client")
        return cls(request_id, scope["method"], scope["path"], client[0] if client else "")

    def line(self, status: int) -> dict[str, Any]:
        """What the access log says of it: several answers one by one, and the task and revision that they share."""
        several = {"answers": [answer.to_dict() for answer in self.answers]} if len(self.answers) > 1 else {}
        times = {name: round(seconds, 6) for name, seconds in self.seconds.items()}
        return {
            "time": self.at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request_id": self.request_id,
            "client": self.client,
            "tenant": self.tenant,
            "method": self.method,
            "path": self.path,
            "status": status,
            "task": _shared(answer.task for answer in self.answers),
            "revision": _shared(answer.revision for answer in self.answers),
            "images": self.images,
            **several,
            "seconds": {"total": round(time.monotonic() - self.began, 6), **times},
        }


def _shared(names: Iterable[str]) -> str:
    """The only name that is not empty; empty when there are several, or none."""
    found = set(names) - {""}
    return found.pop() if len(found) == 1 else ""


class AccessLog:
    """Writes lines.

    Args:
        target: a file, which may be moved away (by logrotate, for example): the next line begins a new one. ``-`` for
            standard output.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, target: str) -> None:
        try:
            self._handler = logging.StreamHandler(sys.stdout) if target == "-" else WatchedFileHandler(Path(target))
        except OSError as error:
            raise UsageError(f"the access log {target} cannot be written: {error.strerror}") from error
        self._waiting: Queue[dict[str, Any] | None] = Queue(MOST_WAITING)
        self._dropped = 0
        self._thread = Thread(target=self._write_all, name="access-log", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Have ``line`` written soon. Does not wait."""
        try:
            self._waiting.put_nowait(line)
        except Full:
            if not self._dropped:
                logger.error("the access log cannot be written fast enough: lines are dropped")
            self._dropped += 1

    def close(self, seconds: float = 2.0) -> None:
        """Wait for the lines to be written, for ``seconds`` at most."""
        try:
            self._waiting.put(None, timeout=seconds)
        except Full:
            return
        self._thread.join(seconds)

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            text = json.dumps(line, separators=(",", ":"))
            self._handler.handle(logging.LogRecord("access", logging.INFO, "", 0, text, None, None))
            if self._dropped and self._waiting.empty():
                logger.error("%d line(s) of the access log were dropped", self._dropped)
                self._dropped = 0
        self._handler.close()
