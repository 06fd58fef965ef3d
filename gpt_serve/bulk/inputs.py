"""Images by number, from a folder or from Parquet tables, on this machine or elsewhere."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, Protocol

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gpt_serve.errors import DataError, ImageError, UsageError
from gpt_serve.images.convert import SUFFIXES, is_of_system, readable

READERS = 8  # files that are read at once


@dataclass(frozen=True)
class Entry:
    """One image.

    Attributes:
        name: what the results call it: a path, or a table's name and the row's number.
        data: the file, as the decoder takes it, or why there is none.
    """

    name: str
    data: bytes | ImageError


class Images(Protocol):
    """Images in a fixed order. Pickles, so that other machines can read their share."""

    def __len__(self) -> int: ...

    def identity(self) -> str:
        """Changes when images are added, removed or resized: a run is only continued with what it began with."""
        ...

    def read(self, start: int, stop: int, size: int) -> Iterator[list[Entry]]:
        """Images ``start`` to ``stop`` in lists of at most ``size``: no more than one list is held."""
        ...


def open_images(source: str, column: str | None = None) -> Images:
    """The images of ``source``.

    Args:
        source: a folder, or a Parquet file or a pattern of such (``tables/*.parquet``); a path or an address such as
            ``s3://bucket/images``.
        column: the column of paths or of image files in tables; None for ``image`` or the only one that can be it.

    Raises:
        DataError: nothing is there, or no column can be the one.
        UsageError: the address cannot be reached.
    """
    try:
        files, root = fsspec.core.url_to_fs(source)
        if root.endswith(".parquet"):
            return TableImages(files, sorted(files.glob(root)), source, column)
        return FolderImages(files, root, source)
    except (DataError, UsageError):
        raise
    except Exception as error:  # of the libraries behind the addresses, whose exceptions share no other base
        raise UsageError(f"--input {source} cannot be read: {_line(error)}") from error


class FolderImages:
    """Every image file below a folder, hidden ones excepted, sorted by path."""

    def __init__(self, files: Any, root: str, source: str) -> None:
        self._files, self._root = files, root.rstrip("/")
        found = files.find(root, detail=True)
        sizes = {path.removeprefix(self._root).lstrip("/"): entry.get("size") for path, entry in found.items()}
        self._sizes = {name: sizes[name] for name in sorted(sizes) if _is_image(name)}
        self._names = list(self._sizes)
        if not self._names:
            raise DataError(f"--input {source} holds no images: name a folder of images, or a .parquet file")

    def __len__(self) -> int:
        return len(self._names)

    def identity(self) -> str:
        """Return the digest of the files' names and sizes."""
        return _digest(self._sizes)

    def read(self, start: int, stop: int, size: int) -> Iterator[list[Entry]]:
        """As `Images.read`."""
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(start, stop, size):
                names = self._names[first : min(first + size, stop)]
                yield list(pool.map(lambda name: Entry(name, read(self._files, f"{self._root}/{name}")), names))


class TableImages:
    """The rows of Parquet tables, in order.

    The column holds image files (binary), paths (strings, relative to the table's folder) or what Hugging Face data
    sets call an image: a struct of ``bytes`` and ``path``.
    """

    def __init__(self, files: Any, paths: Sequence[str], source: str, column: str | None) -> None:
        if not paths:
            raise DataError(f"--input {source}: there is no such table")
        self._files, self._paths = files, paths
        heads = [self._open(path) for path in paths]
        self._rows = [head.metadata.num_rows for head in heads]
        self._ends: list[int] = list(accumulate(self._rows))
        if not self._ends[-1]:
            raise DataError(f"--input {source} has no rows")
        self._column = _choose(heads[0].schema_arrow, column, source)
        for head in heads:
            head.close()

    def __len__(self) -> int:
        return self._ends[-1]

    def identity(self) -> str:
        """Return the digest of the tables' names, sizes and numbers of rows."""
        return _digest(
            [self._column, [(p, self._files.size(p), n) for p, n in zip(self._paths, self._rows, strict=True)]]
        )

    def read(self, start: int, stop: int, size: int) -> Iterator[list[Entry]]:
        """As `Images.read`."""
        with ThreadPoolExecutor(READERS) as pool:
            for index in range(bisect_right(self._ends, start), len(self._paths)):
                before = self._ends[index] - self._rows[index]
                if before >= stop:
                    return
                for first, values in self._values(index, max(0, start - before), stop - before, size):
                    numbers = range(first, first + len(values))
                    yield list(pool.map(partial(self._entry, index), numbers, values))

    def _values(self, index: int, start: int, stop: int, size: int) -> Iterator[tuple[int, list[Any]]]:
        """Rows ``start`` to ``stop`` of a table in lists, each with the number of its first."""
        with self._open(self._paths[index]) as table:
            first = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if first + rows > start and first < stop:
                    yield from _slices(table.iter_batches(size, [group], [self._column]), first, start, stop)
                first += rows

    def _open(self, path: str) -> pq.ParquetFile:
        # Buffered, so that a group of rows is never held as a whole: one may hold gigabytes of images.
        return pq.ParquetFile(self._files.open(path, "rb"), pre_buffer=False, buffer_size=2**20)

    def _entry(self, index: int, row: int, value: Any) -> Entry:
        name = f"{PurePosixPath(self._paths[index]).name}#{row}"
        if isinstance(value, dict):
            name = str(value.get("path") or name)
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return Entry(value, self._read_path(self._paths[index], value))
        return Entry(name, ImageError("there is none in this row") if value is None else _readable(value))

    def _read_path(self, table: str, path: str) -> bytes | ImageError:
        if "://" in path:
            return read(*fsspec.core.url_to_fs(path))
        return read(self._files, path if path.startswith("/") else f"{PurePosixPath(table).parent}/{path}")


def _slices(batches: Iterator[pa.RecordBatch], first: int, start: int, stop: int) -> Iterator[tuple[int, list[Any]]]:
    """Of rows that begin with number ``first`` those from ``start`` to ``stop``."""
    for batch in batches:
        low, high = max(start - first, 0), min(stop - first, len(batch))
        if low < high:
            yield first + low, batch.column(0).slice(low, high - low).to_pylist()
        first += len(batch)


def read(files: Any, path: str) -> bytes | ImageError:
    """An image file as the decoder takes it, or why there is none: trouble with one image is a row, not an end."""
    try:
        data: bytes = files.cat_file(path)
    except Exception as error:  # see `open_images`
        return ImageError(f"cannot be read: {_line(error)}")
    return _readable(data)


def _readable(data: bytes) -> bytes | ImageError:
    try:
        return readable(data)
    except ImageError as error:
        return error


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(map(is_of_system, path.parts))


def _choose(schema: pa.Schema, column: str | None, source: str) -> str:
    able = [field.name for field in schema if _can_hold_images(field.type)]
    chosen = column or ("image" if "image" in able else able[0] if len(able) == 1 else "")
    if chosen in able:
        return chosen
    what = f"has no column {column!r} of images" if column else "has no one column of images"
    raise DataError(f"--input {source} {what}: use --column with one of {', '.join(able) or '(none that can be)'}")


def _can_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_kind(kind) for is_kind in kinds)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
