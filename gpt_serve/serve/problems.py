"""Errors as HTTP: the one table of status codes, and ``application/problem+json`` (RFC 9457)."""

import json
import logging
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gpt_serve import errors

logger = logging.getLogger("gpt_serve.serve")

MEDIA_TYPE = "application/problem+json"

STATUS: dict[type[errors.GPTServeError], tuple[int, str]] = {
    # What the operator got wrong: found at start, never a client's business.
    errors.GPTServeError: (500, "Internal server error"),
    errors.UsageError: (500, "Internal server error"),
    errors.DataError: (500, "Internal server error"),
    errors.ExportError: (500, "Internal server error"),
    errors.ServerError: (500, "Internal server error"),
    errors.UnsupportedBackbone: (500, "Internal server error"),
    errors.CheckpointError: (500, "Internal server error"),
    errors.InvalidTaskName: (400, "Invalid task name"),
    errors.UnknownTask: (404, "Unknown task"),
    # The task exists, but not usably until its file is replaced; the others are served.
    errors.InvalidAdapter: (503, "Adapter refused"),
    errors.BackboneMismatch: (503, "Adapter refused"),
    errors.BankFull: (503, "Adapter refused"),
    errors.ImageTooLarge: (413, "Content too large"),
    errors.UnsupportedImage: (415, "Unsupported image type"),
    errors.UndecodableImage: (422, "Image cannot be decoded"),
    errors.InvalidRequest: (400, "Invalid request"),
    errors.InvalidKey: (401, "Unauthorized"),
    errors.TaskForbidden: (403, "Task forbidden"),
    errors.TurnedAway: (503, "Overloaded"),
    errors.RateLimited: (429, "Too many requests"),
    errors.Overloaded: (503, "Overloaded"),
    errors.NotReady: (503, "Not ready"),
    errors.DeadlineExceeded: (504, "Deadline exceeded"),
}

# Seconds after which trying again may help, by error; every 503 names some, and a `TurnedAway` knows its own.
RETRY_AFTER: dict[type[errors.GPTServeError], int] = {
    errors.InvalidAdapter: 60,
    errors.BackboneMismatch: 60,
    errors.BankFull: 60,
    errors.NotReady: 5,
}


class HTTPError(Exception):
    """A refusal that only HTTP knows: a wrong content type, a missing key."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}


def status_of(error: errors.GPTServeError) -> int:
    """The status code that ``error`` becomes."""
    return STATUS[_known(error)][0]


def problem_of(error: Exception, **members: str) -> Response:
    """The response that tells the client about ``error``; the details of a 500 stay in the log.

    Args:
        members: more members of the problem (RFC 9457, section 3.2).
    """
    if isinstance(error, HTTPError):
        return problem(error.status, HTTPStatus(error.status).phrase, str(error), headers=error.headers)
    if isinstance(error, errors.GPTServeError):
        known = _known(error)
        status, title = STATUS[known]
        if status != 500:
            seconds = math.ceil(error.seconds) if isinstance(error, errors.TurnedAway) else RETRY_AFTER.get(known)
            headers = {} if seconds is None else {"Retry-After": str(seconds)}
            if status == 401:
                headers["WWW-Authenticate"] = "APIKey"
            return problem(status, title, str(error), kind=known.__name__, headers=headers, members=members)
    logger.error("internal error while answering a request: %s", error, exc_info=error)
    detail = "the server failed on this request; its log says why"
    return problem(500, "Internal server error", detail, members=members)


def _known(error: errors.GPTServeError) -> type[errors.GPTServeError]:
    return next(cls for cls in type(error).__mro__ if cls in STATUS)


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    kind: str | None = None,
    headers: dict[str, str] | None = None,
    members: Mapping[str, str] = MappingProxyType({}),
) -> Response:
    """An RFC 9457 response; ``kind`` is the error's class name, which becomes the problem type."""
    slug = re.sub(r"(?<!^)(?=[A-Z])", "-", kind).lower() if kind else None
    body = {
        "type": f"urn:gpt-serve:problem:{slug}" if slug else "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        **members,
    }
    # ASCII output: a detail may quote a lone surrogate, which UTF-8 cannot carry.
    return Response(json.dumps(body).encode(), status, headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make every error of ``app``, the framework's own included, a problem."""

    async def ours(_: Request, error: Exception) -> Response:
        return problem_of(error)

    async def framework(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return problem(error.status_code, HTTPStatus(error.status_code).phrase, error.detail, headers=headers)

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem_of(errors.InvalidRequest("; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())))

    for kind, handler in (
        (errors.GPTServeError, ours),
        (HTTPError, ours),
        (HTTPException, framework),
        (RequestValidationError, validation),
        (Exception, ours),
    ):
        app.add_exception_handler(kind, handler)
