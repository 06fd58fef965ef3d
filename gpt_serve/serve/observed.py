"""Around all routes: every answer is counted, logged and traced, and carries its request's id."""

from typing import Any

from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_serve.serve.access import KEY, AccessLog, Record
from gpt_serve.serve.desk import Desk


class Observed:
    """ASGI middleware. Leaves a `Record` in the scope for the routes to fill in, and answers HEAD as GET.

    Args:
        app: what answers.
        desk: where answers are counted.
        log: where they are logged, if anywhere.
    """

    def __init__(self, app: ASGIApp, desk: Desk, log: AccessLog | None) -> None:
        self.app = app
        self.desk = desk
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record, status = Record.of(scope), 500
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        inner = {**scope, KEY: record, "method": method}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self.app(inner, receive, sending)
        finally:
            self._ended(record, inner, status)

    def _ended(self, record: Record, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", "")
        line = record.line(status)
        answers = [(answer.task, answer.status) for answer in record.answers] or [("", status)]
        self.desk.answered(route, record.tenant, status, answers, line["seconds"]["total"])
        _trace(line)
        if self.log is not None:
            self.log.write(line)


def _trace(line: dict[str, Any]) -> None:
    """Add to the request's span what only this server knows."""
    span = trace.get_current_span()
    if span.is_recording():
        for name in ("request_id", "tenant", "task", "revision", "images"):
            if line[name]:
                span.set_attribute(f"gpt_serve.{name}", line[name])
        for name, seconds in line["seconds"].items():
            span.set_attribute(f"gpt_serve.seconds.{name}", seconds)
