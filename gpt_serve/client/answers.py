"""From responses to answers and errors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from gpt_serve.errors import GPTServeError, InvalidKey, InvalidRequest, ServerError, revive

_PROBLEM = "urn:gpt-serve:problem:"


@dataclass(frozen=True)
class Label:
    """A class and its probability in [0, 1]."""

    label: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What a server says of one image for one task.

    Attributes:
        task: the task that was asked.
        revision: the revision of the adapter that computed the answer: the first 12 hex digits of its file's SHA-256.
        predictions: the most probable classes, best first; empty for a task that answers something else.
        content: the whole answer, for what only some tasks say, such as ``"mask"``.
        known: the share of the task's validation images that lie at least as far from what it was trained on, in
            [0, 1]; None for a task that cannot tell.
        unknown: whether the image is unlike all that the task was trained on; None for a task that cannot tell.
    """

    task: str
    revision: str
    predictions: tuple[Label, ...]
    content: Mapping[str, Any]
    known: float | None = None
    unknown: bool | None = None

    @property
    def best(self) -> Label:
        """The most probable class. Raises `IndexError` when there are no predictions."""
        return self.predictions[0]


def answer_of(response: httpx.Response) -> Answer:
    """The answer that a successful response holds. Raises `ServerError` when it holds none."""
    try:
        return _answer(object_of(response))
    except (KeyError, TypeError):
        raise _not_ours(response) from None


def answers_of(response: httpx.Response, count: int) -> list[Answer | GPTServeError]:
    """The ``count`` answers, or errors, that a successful response lists. Raises `ServerError` when it does not."""
    content = _json(response)
    if not isinstance(content, list) or len(content) != count:
        raise _not_ours(response)
    try:
        return [_error(item, item["status"]) if "detail" in item else _answer(item) for item in content]
    except (AttributeError, KeyError, TypeError):
        raise _not_ours(response) from None


def object_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object that a successful response holds. Raises `ServerError` when it holds none."""
    content = _json(response)
    if not isinstance(content, dict):
        raise _not_ours(response)
    return content


def error_of(response: httpx.Response) -> GPTServeError:
    """The error that an unsuccessful response stands for."""
    try:
        return _error(response.json(), response.status_code)
    except (AttributeError, KeyError, ValueError):
        return ServerError(f"{response.request.url} answered {response.status_code} {response.reason_phrase}")


def _answer(content: dict[str, Any]) -> Answer:
    predictions = tuple(Label(item["label"], item["probability"]) for item in content.get("predictions", ()))
    strangeness = content.get("known"), content.get("unknown")
    return Answer(content["task"], content["revision"], predictions, content, *strangeness)


def _error(problem: dict[str, Any], status: int) -> GPTServeError:
    """The error behind a problem (RFC 9457)."""
    kind, detail = str(problem.get("type", "")), str(problem["detail"])
    if kind.startswith(_PROBLEM):
        words = kind.removeprefix(_PROBLEM).split("-")
        return revive("".join(word.capitalize() for word in words), detail)
    if status == 401:
        return InvalidKey(detail)
    return InvalidRequest(detail) if status < 500 else ServerError(detail)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise _not_ours(response) from None


def _not_ours(response: httpx.Response) -> ServerError:
    return ServerError(f"{response.request.url} does not answer as GPT-Serve does: check the address")
