"""From responses to answers and errors."""

from base64 import b64decode
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
class ClassShare:
    """A class of a segmentation task: its id in the mask, its label, and its share of the pixels in [0, 1]."""

    id: int
    label: str
    share: float


@dataclass(frozen=True)
class Segmentation:
    """What a segmentation task says of an image.

    Attributes:
        width: of the image and its mask in pixels, after the image's EXIF rotation.
        height: the same.
        classes: all classes of the task, by id.
        mask: a PNG file with a palette, whose pixels are class ids.
    """

    width: int
    height: int
    classes: tuple[ClassShare, ...]
    mask: bytes


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
        segmentation: of a task that answers with a mask; None for others.
    """

    task: str
    revision: str
    predictions: tuple[Label, ...]
    content: Mapping[str, Any]
    known: float | None = None
    unknown: bool | None = None
    segmentation: Segmentation | None = None

    @property
    def best(self) -> Label:
        """The most probable class. Raises `IndexError` when there are no predictions."""
        return self.predictions[0]


def answer_of(response: httpx.Response) -> Answer:
    """The answer that a successful response holds. Raises `ServerError` when it holds none."""
    try:
        return _answer(object_of(response))
    except (KeyError, TypeError, ValueError):
        raise _not_ours(response) from None


def answers_of(response: httpx.Response, count: int) -> list[Answer | GPTServeError]:
    """The ``count`` answers, or errors, that a successful response lists. Raises `ServerError` when it does not."""
    content = _json(response)
    if not isinstance(content, list) or len(content) != count:
        raise _not_ours(response)
    try:
        return [_outcome(item) for item in content]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _not_ours(response) from None


def answers_by_task(response: httpx.Response) -> dict[str, Answer | GPTServeError]:
    """The answer, or the error, of each task in a successful response. Raises `ServerError` when it lists none."""
    content = _json(response)
    if not isinstance(content, list):
        raise _not_ours(response)
    try:
        return {item["task"]: _outcome(item) for item in content}
    except (AttributeError, KeyError, TypeError, ValueError):
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


def _outcome(item: dict[str, Any]) -> Answer | GPTServeError:
    return _error(item, item["status"]) if "detail" in item else _answer(item)


def _answer(content: dict[str, Any]) -> Answer:
    predictions = tuple(Label(item["label"], item["probability"]) for item in content.get("predictions", ()))
    segmentation = _segmentation(content) if content.get("kind") == "segmentation" else None
    strangeness = content.get("known"), content.get("unknown")
    return Answer(content["task"], content["revision"], predictions, content, *strangeness, segmentation)


def _segmentation(content: dict[str, Any]) -> Segmentation:
    classes = tuple(ClassShare(item["id"], item["label"], item["share"]) for item in content["classes"])
    mask = b64decode(content["mask"], validate=True)
    return Segmentation(content["width"], content["height"], classes, mask)


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
