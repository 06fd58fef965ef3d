"""Multipart forms from strangers (RFC 7578)."""

from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gpt_serve.errors import InvalidRequest

_MAX_FIELD_BYTES = 4096


class Form:
    """A multipart form (RFC 7578), read with a limit on everything but the files' bytes."""

    def __init__(self, content_type: str, most_parts: int) -> None:
        self.most_parts = most_parts
        self.parts: list[tuple[str, bool, bytes]] = []  # name, whether it is a file, content
        self._complete = False
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value, self._content = bytearray(), bytearray(), bytearray()
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise InvalidRequest("the form cannot be read: its content type names no boundary")
        callbacks: Any = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks, max_header_count=8, max_header_size=_MAX_FIELD_BYTES)
        except FormParserError as error:
            raise InvalidRequest(f"the form cannot be read: {error}") from None

    def parse(self, body: bytes) -> list[tuple[str, bool, bytes]]:
        """The parts in order: name, whether it is a file, content."""
        try:
            self._parser.write(body)
        except FormParserError:
            raise InvalidRequest("the form cannot be read: it is not what its content type promises") from None
        if not self._complete:
            raise InvalidRequest("the form cannot be read: it ends before its last boundary")
        return self.parts

    def _begin_part(self) -> None:
        if len(self.parts) >= self.most_parts:
            raise InvalidRequest(f"the form has more than {self.most_parts} parts: send fewer")
        self._headers, self._content = {}, bytearray()

    def _end_header(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise InvalidRequest("the form cannot be read: one of its parts has no name")
        is_file = b"filename" in options
        if not is_file and len(self._content) > _MAX_FIELD_BYTES:
            raise InvalidRequest(f"a field of the form has more than {_MAX_FIELD_BYTES} bytes: send a file as a file")
        self.parts.append((text_of(options[b"name"]), is_file, bytes(self._content)))

    def _end(self) -> None:
        self._complete = True


def text_of(value: bytes) -> str:
    """A field or a name of a form. Raises `InvalidRequest` where it is no UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the form cannot be read: its text is not UTF-8") from None
