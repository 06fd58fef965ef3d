"""The request of ``POST /predict``: from untrusted bytes to a task, an image file and a number."""

import base64
import binascii
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from gpt_serve.errors import ImageTooLarge, InvalidRequest
from gpt_serve.serve.problems import HTTPError
from gpt_serve.specs import check_task_name

FIELDS = ("task", "image", "top_k")
DEFAULT_TOP_K = 5
MAX_TOP_K = 1000
_MAX_FIELD_BYTES = 4096


@dataclass(frozen=True)
class PredictRequest:
    """A well-formed request; whether the task exists and the image decodes is not known yet."""

    task: str
    image: bytes
    top_k: int


async def read_request(request: Request, max_bytes: int) -> PredictRequest:
    """Read and check ``request``, never holding more than ``max_bytes`` of its body.

    Raises:
        HTTPError: 415, neither a form nor JSON.
        ImageTooLarge: the body is larger than ``max_bytes``.
        InvalidRequest: a field is missing, unknown, given twice or malformed.
        InvalidTaskName: the task's name breaks the rules.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in ("multipart/form-data", "application/json"):
        raise HTTPError(415, "send a multipart/form-data form, or application/json with the image in base64")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPError(415, "send the body without content-encoding: images are compressed already")
    body = await _read_body(request, max_bytes)
    fields = _json_fields(body) if content_type == "application/json" else await _form_fields(request.headers, body)
    for name, text in request.query_params.multi_items():
        if name not in ("task", "top_k"):
            raise InvalidRequest(f"unknown query parameter {name[:64]!r}: only task and top_k may be given there")
        value = _top_k(text) if name == "top_k" else text
        if fields.setdefault(name, value) != value:
            raise InvalidRequest(f"{name} is given twice with different values: give it once")
    for name, hint in (("task", "the name of a task, see GET /tasks"), ("image", "a JPEG, PNG or WebP file")):
        if not fields.get(name):
            raise InvalidRequest(f"field {name!r} is missing or empty: give {hint}")
    return PredictRequest(check_task_name(fields["task"]), fields["image"], fields.get("top_k", DEFAULT_TOP_K))


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; a declared length is refused early, an undeclared one as soon as it grows too large."""
    too_large = ImageTooLarge(f"the body has more than {max_bytes} bytes: send a smaller image")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise InvalidRequest("the client left before its request was complete") from None
    return bytes(body)


def _json_fields(body: bytes) -> dict[str, Any]:
    try:
        # A hostile body may nest a million brackets, spell a million-digit number, or name a key twice.
        fields = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not valid JSON: send an object with task and image") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is not a JSON object: send one with task and image")
    _check_names(fields)
    if not isinstance(fields.get("task", ""), str):
        raise InvalidRequest("field 'task' must be a string")
    if "top_k" in fields:
        fields["top_k"] = _top_k(fields["top_k"])
    if "image" in fields:
        fields["image"] = _base64(fields["image"])
    return fields


async def _form_fields(headers: Headers, body: bytes) -> dict[str, Any]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(headers, stream(), max_files=1, max_fields=2, max_part_size=_MAX_FIELD_BYTES)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"the form cannot be read: {error.message}") from None
    except ValueError:  # a charset that makes no sense
        raise InvalidRequest("the form cannot be read: its text is not UTF-8") from None
    try:
        fields = await _parts(form)
    finally:
        await form.close()  # what was uploaded, which is a file of its own
    _check_names(fields)
    if "top_k" in fields:
        fields["top_k"] = _top_k(fields["top_k"])
    return fields


async def _parts(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise InvalidRequest(f"field {name[:64]!r} is given twice: give it once")
        if isinstance(value, UploadFile) is not (name == "image"):
            raise InvalidRequest(f"field {name[:64]!r} must {'' if name == 'image' else 'not '}be a file")
        fields[name] = await value.read() if isinstance(value, UploadFile) else value
    return fields


def _check_names(fields: dict[str, Any]) -> None:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0][:64]!r}: the fields are {', '.join(FIELDS)}")


def _top_k(value: Any) -> int:
    """``value`` as a number of labels; forms and queries carry it as text."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 4:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOP_K:
        raise InvalidRequest(f"top_k must be a whole number from 1 to {MAX_TOP_K}")
    return value


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
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("field 'image' is not valid base64") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is given twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
