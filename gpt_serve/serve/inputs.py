"""The request of a prediction: from the bytes of a body to tasks, image files and a number.

Bodies come from strangers. What a valid one can hold is bounded before anything is parsed, so that no body costs more
than a few passes over its bytes, and all that is not small is parsed outside the event loop.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from gpt_serve.errors import InvalidRequest, UnsupportedImage
from gpt_serve.images.headers import identify
from gpt_serve.serve.forms import Form, text_of
from gpt_serve.serve.messages import MaskFormat
from gpt_serve.serve.problems import HTTPError
from gpt_serve.specs import check_task_name

FIELDS = ("task", "tasks", "image", "top_k", "mask")
IN_QUERY = ("task", "tasks", "top_k", "mask")
MAX_TOP_K = 1000
MAX_IMAGES = 64
MAX_TASKS = 256
EVERY = "*"
"""What the field ``tasks`` says: all tasks that the caller may use."""

_MAX_PARTS = MAX_IMAGES + MAX_TASKS + 8
_MAX_JSON_MARKS = 4 * _MAX_PARTS  # quotes, brackets, commas: a body that holds more is no request
_JSON_MARKS = (b'"', b"[", b"{", b",")
_BASE64_SLICE = 4 * 2**16
_HEAD, _HEAD_TEXT = 64, 1024  # bytes of a file that tell what it is, and characters of base64 that hold them

Fields = dict[str, Any]


@dataclass(frozen=True)
class PredictRequest:
    """A well-formed request; whether the tasks exist and the images decode is not known yet.

    Attributes:
        tasks: valid names, no two alike; None for all tasks that the caller may use.
        images: one file or more.
        top_k: how many labels an answer lists at most; None for the usual number, or where images have several labels
            for all that are above their threshold.
        mask: how a mask is given; None for the usual way.
        several_images: whether the images came as a list, so that the answer is a list, too.
        several_tasks: whether the tasks came as a list, so that there is a list of answers for each image.
    """

    tasks: tuple[str, ...] | None
    images: tuple[bytes, ...]
    top_k: int | None = None
    mask: MaskFormat | None = None
    several_images: bool = False
    several_tasks: bool = False


def media_type(headers: Mapping[str, str]) -> str:
    """The request's media type without its parameters, in lower case; empty if there is none.

    Raises:
        HTTPError: 415, the body is compressed.
    """
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPError(415, "send the body without content-encoding: images are compressed already")
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_media_type(kind: str) -> None:
    """Raise `HTTPError` 415 unless a body of this type has fields."""
    if kind not in ("multipart/form-data", "application/json"):
        raise HTTPError(415, "send a multipart/form-data form, or application/json with the image in base64")


def parse(headers: Mapping[str, str], query: Iterable[tuple[str, str]], body: bytes, task: str = "") -> PredictRequest:
    """The request that ``body`` and ``query`` make.

    Args:
        headers: the request's.
        query: the parameters of its target, in order.
        body: all of it. A form, or JSON; where ``task`` is given, anything else is the image itself.
        task: the name in the path; empty if there is none.

    Raises:
        HTTPError: 415, neither a form nor JSON.
        InvalidRequest: a field is missing, unknown, given twice or malformed.
        InvalidTaskName: the task's name breaks the rules.
    """
    kind = media_type(headers)
    if kind == "application/json":
        fields = _json_fields(body)
    elif kind == "multipart/form-data" or not task:
        check_media_type(kind)
        fields = _form_fields(headers["content-type"], body)
    else:
        fields = {"image": body}
    if task:
        _add(fields, "task", task)
    for name, value in _query_fields(query).items():
        _add(fields, name, value)
    tasks, images = _tasks(fields), fields.get("image")
    if not images:
        raise _missing("image", "a JPEG, PNG or WebP file")
    return PredictRequest(
        tasks,
        tuple(image if _begins_an_image(image) else image[:_HEAD] for image in _listed(images)),
        fields.get("top_k"),
        _mask_format(fields["mask"]) if "mask" in fields else None,
        several_images=isinstance(images, list),
        several_tasks="tasks" in fields or isinstance(fields["task"], list),
    )


def _tasks(fields: Fields) -> tuple[str, ...] | None:
    """The names that ``task`` gives; None where ``tasks`` asks for all."""
    if "tasks" in fields:
        if fields["tasks"] != EVERY:
            raise InvalidRequest(f"tasks can only be {EVERY!r}, for all of them: name each with a task field")
        if "task" in fields:
            raise InvalidRequest(f"task and tasks={EVERY} are both given: give one of them")
        return None
    names = _listed(fields.get("task") or [])
    if not all(names) or not names:
        raise _missing("task", "the name of a task, see GET /tasks")
    if len(names) > MAX_TASKS:
        raise InvalidRequest(f"there are {len(names)} tasks, more than the {MAX_TASKS} allowed: ask for fewer at once")
    seen: set[str] = set()
    for name in names:
        if check_task_name(name) in seen:
            raise InvalidRequest(f"the task {name!r} is given twice: give each once")
        seen.add(name)
    return tuple(names)


def _missing(name: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"field {name!r} is missing or empty: give {hint}")


def _query_fields(query: Iterable[tuple[str, str]]) -> Fields:
    """The fields in a request's target; ``task`` may be repeated."""
    fields: Fields = {}
    names: list[str] = []
    for name, text in query:
        if name not in IN_QUERY:
            raise InvalidRequest(
                f"unknown query parameter {name[:64]!r}: only {', '.join(IN_QUERY)} may be given there"
            )
        if name == "task":
            names.append(text)
        else:
            _add(fields, name, _top_k(text) if name == "top_k" else text)
    if names:
        fields["task"] = names if len(names) > 1 else names[0]
    return fields


def _add(fields: Fields, name: str, value: Any) -> None:
    if fields.setdefault(name, value) != value:
        raise InvalidRequest(f"{name} is given twice with different values: give it once")


def _json_fields(body: bytes) -> Fields:
    # What a hostile body may do: nest a million brackets, name a million keys, spell a million-digit number.
    if any(_more_than(_MAX_JSON_MARKS, mark, body) for mark in _JSON_MARKS):
        raise InvalidRequest(
            f"the body holds too much JSON: send an object with at most {MAX_TASKS} tasks and {MAX_IMAGES} images"
        )
    try:
        fields = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not valid JSON: send an object with task and image") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is not a JSON object: send one with task and image")
    _check_names(fields)
    if not all(isinstance(name, str) for name in _listed(fields.get("task", ""))):
        raise InvalidRequest("field 'task' must be a string or a list of strings")
    if "top_k" in fields:
        fields["top_k"] = _top_k(fields["top_k"])
    if "image" in fields:
        images = fields["image"]
        fields["image"] = _base64s(images) if isinstance(images, list) else _base64(images)
    return fields


def _more_than(most: int, mark: bytes, body: bytes) -> bool:
    """Whether ``mark`` is in ``body`` more than ``most`` times, without a look at what comes after."""
    position = -1
    for _ in range(most + 1):
        position = body.find(mark, position + 1)
        if position < 0:
            return False
    return True


def _form_fields(content_type: str, body: bytes) -> Fields:
    fields: Fields = {}
    for name, is_file, value in Form(content_type, _MAX_PARTS).parse(body):
        if is_file is not (name == "image"):
            raise InvalidRequest(f"field {name[:64]!r} must {'' if name == 'image' else 'not '}be a file")
        if name in fields and name in ("task", "image"):
            fields[name] = [*_listed(fields[name]), value if is_file else text_of(value)]
        elif name in fields:
            raise InvalidRequest(f"field {name[:64]!r} is given twice: give it once")
        else:
            fields[name] = value if is_file else text_of(value)
    _check_names(fields)
    if isinstance(fields.get("image"), list):
        _check_images(fields["image"])
    if "top_k" in fields:
        fields["top_k"] = _top_k(fields["top_k"])
    return fields


def _check_names(fields: Fields) -> None:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0][:64]!r}: the fields are {', '.join(FIELDS)}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_images(images: list[Any]) -> None:
    if len(images) > MAX_IMAGES:
        raise InvalidRequest(f"there are {len(images)} images, more than the {MAX_IMAGES} allowed: send fewer at once")
    if not all(images):
        raise InvalidRequest("one of the images is empty: give a JPEG, PNG or WebP file")


def _mask_format(value: Any) -> MaskFormat:
    if value not in get_args(MaskFormat):
        raise InvalidRequest(f"mask must be one of {', '.join(get_args(MaskFormat))}")
    return value  # type: ignore[no-any-return]


def _top_k(value: Any) -> int:
    """``value`` as a number of labels; forms and queries carry it as text."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 4:
        value = int(value)
    if isinstance(value, float) and value.is_integer():  # 5.0 is a whole number, to JSON
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOP_K:
        raise InvalidRequest(f"top_k must be a whole number from 1 to {MAX_TOP_K}")
    return value


def _base64s(values: list[Any]) -> list[bytes]:
    _check_images(values)
    return [_base64(value) for value in values]


def _base64(value: Any) -> bytes:
    """The bytes behind ``value``; line breaks are allowed, as the usual tools write them.

    A ``data:`` URI (RFC 2397), as browsers make them, is taken too: ``data:image/png;base64,iVBOR...``. What type it
    promises does not matter, because the image's own bytes say what it is.
    """
    if not isinstance(value, str):
        raise InvalidRequest("field 'image' must be a string with the file in base64")
    if value[:5].lower() == "data:":
        head, comma, value = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidRequest("field 'image' is a data: URI without base64: send data:image/...;base64,...")
    try:
        text = _plain(value[:_HEAD_TEXT])
        if len(value) > _HEAD_TEXT and not _begins_an_image(first := _decoded(text[: len(text) // 4 * 4])):
            return first
        return _decoded(_plain(value))
    except (binascii.Error, ValueError):
        raise InvalidRequest("field 'image' is not valid base64") from None


def _begins_an_image(data: bytes) -> bool:
    """Whether this is an image as far as its first bytes tell. Of what is not, nobody need carry more to say so."""
    try:
        identify(data[:_HEAD])
    except UnsupportedImage:
        return False
    return True


def _plain(text: str) -> bytes:
    return text.encode("ascii").translate(None, b" \t\r\n")


def _decoded(text: bytes) -> bytes:
    """``text`` from base64, slice by slice: the decoder keeps all threads waiting while it runs."""
    parts = []
    for start in range(0, len(text), _BASE64_SLICE):
        part = text[start : start + _BASE64_SLICE]
        if b"=" in part and start + _BASE64_SLICE < len(text):
            raise ValueError("padding before the end")
        parts.append(base64.b64decode(part, validate=True))
    return b"".join(parts)


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is given twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
