"""Adapter files beyond this machine's disks: in S3, in Google Cloud Storage, on a shared file system, on a hub.

The layout is the one of a folder, ``<address>/<task>/adapter.safetensors``, so that a folder can be copied there with
any tool. Beside each adapter ``push`` leaves ``adapter.safetensors.sha256``, which ``sha256sum --check`` reads too:
what is fetched must have this digest.
"""

import errno
import hashlib
import importlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpt_serve.adapters.parse import MAX_FILE_BYTES
from gpt_serve.adapters.source import FILE_NAME
from gpt_serve.errors import InvalidAdapter, UsageError
from gpt_serve.specs import TASK_PATTERN

DIGEST_NAME = f"{FILE_NAME}.sha256"
CONNECT_SECONDS, READ_SECONDS = 5, 15
PUSH_SECONDS = 1.0  # a publisher needs less to write the second of two files


@dataclass(frozen=True)
class Scheme:
    """How addresses of one kind are reached.

    Attributes:
        module: what fsspec needs for it.
        extra: what to install for that.
        options: of the file system.
    """

    module: str
    extra: str
    options: Mapping[str, Any] = field(default_factory=dict)


SCHEMES = {
    "s3": Scheme(
        "s3fs",
        "gpt-serve[s3]",
        {
            "config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS},
            "max_concurrency": 1,  # else each file costs a HEAD, to see whether it is worth fetching in parts
        },
    ),
    "gs": Scheme("gcsfs", "gpt-serve[gs]", {"requests_timeout": READ_SECONDS}),
    "file": Scheme("fsspec", "gpt-serve"),
    "hf": Scheme("huggingface_hub", "gpt-serve"),
}


@dataclass(frozen=True)
class Listed:
    """An adapter file as a listing shows it.

    Attributes:
        size: bytes.
        version: changes with the file and with its digest.
        digest: whether there is one.
    """

    size: int
    version: str
    digest: bool


class Bucket:
    """The files below one address. Trouble with the other side is an `OSError` whose ``strerror`` is for the user.

    Args:
        address: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``file:///path`` or ``hf://owner/repo``. Credentials
            and endpoints come from the environment, as for the tools of each: ``AWS_ACCESS_KEY_ID``,
            ``AWS_ENDPOINT_URL``, ``~/.aws``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``HF_TOKEN``.

    Raises:
        UsageError: the address cannot be one, or its library is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        scheme, _, path = self.address.partition("://")
        if scheme not in SCHEMES or path.count("/") < (scheme == "hf") or not path.strip("/"):
            raise UsageError(
                f"{address} is no address of adapters: use a folder, s3://bucket/prefix, gs://bucket/prefix, "
                "file:///path or hf://owner/repo"
            )
        kind = SCHEMES[scheme]
        try:
            importlib.import_module(kind.module)
            import fsspec
        except ImportError as error:
            raise UsageError(f"{address} needs {kind.module}: pip install '{kind.extra}'") from error
        self.scheme = scheme
        self._files: Any = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **kind.options)
        self._root: str = self._files._strip_protocol(self.address)

    def list(self) -> dict[str, Listed]:
        """Every task that has an adapter file, for one listing: in S3 a call for each thousand files.

        Raises:
            OSError: the place cannot be listed now.
        """
        with reaching(self.address):
            self._files.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._files.find(self._root, detail=True)
        depth = self._root.count("/") + 2
        files: dict[str, dict[str, dict[str, Any]]] = {}
        for path, entry in found.items():
            *_, task, name = path.split("/")
            if path.count("/") == depth and name in (FILE_NAME, DIGEST_NAME) and TASK_PATTERN.fullmatch(task):
                files.setdefault(task, {})[name] = entry
        return {task: _listed(entries) for task, entries in files.items() if FILE_NAME in entries}

    def read(self, task: str, listed: Listed) -> bytes:
        """The adapter file as it is now, which may be newer than ``listed``.

        Raises:
            OSError: it cannot be read now, or changes just now.
            FileNotFoundError: it is gone.
            InvalidAdapter: it is too large, or has not the digest that its publisher wrote.
        """
        if listed.size > MAX_FILE_BYTES:
            raise InvalidAdapter(f"the file has {listed.size} bytes, more than the {MAX_FILE_BYTES} allowed")
        if not listed.digest:
            data = self._get(task, FILE_NAME)
            if len(data) != listed.size:
                raise OSError(errno.EAGAIN, "it was replaced since it was listed")
            return data
        data, wanted = self._get(task, FILE_NAME), self._digest(task)
        if hashlib.sha256(data).hexdigest() != wanted:  # perhaps between the two files of a publication
            time.sleep(PUSH_SECONDS)
            data, wanted = self._get(task, FILE_NAME), self._digest(task)
        found = hashlib.sha256(data).hexdigest()
        if found != wanted:
            raise InvalidAdapter(
                f"the file has the digest {found[:12]}, its publisher wrote {wanted[:12]}: push it again"
            )
        return data

    def companions(self, task: str) -> dict[str, bytes]:
        """What lies beside the adapter: its card and plots.

        Raises:
            OSError: it cannot be read now.
        """
        with reaching(self.address):
            paths: list[str] = self._files.find(f"{self._root}/{task}", maxdepth=1)
            names = [path.rpartition("/")[2] for path in paths]
        return {name: self._get(task, name) for name in names if name not in (FILE_NAME, DIGEST_NAME)}

    def write(self, task: str, files: Mapping[str, bytes]) -> None:
        """Put or replace files of a task, the adapter and its digest last.

        Raises:
            OSError: the other side refuses.
        """
        last = {FILE_NAME: files[FILE_NAME], DIGEST_NAME: digest_line(files[FILE_NAME])}
        with reaching(self.address):
            if self.scheme == "file":
                self._files.makedirs(f"{self._root}/{task}", exist_ok=True)
            for name, data in ({name: files[name] for name in files if name not in last} | last).items():
                self._put(f"{self._root}/{task}/{name}", data)

    def _put(self, path: str, data: bytes) -> None:
        if self.scheme != "file":
            self._files.pipe_file(path, data)  # object stores replace as a whole
            return
        temporary = f"{path}.tmp"
        self._files.pipe_file(temporary, data)
        self._files.mv(temporary, path)

    def _get(self, task: str, name: str) -> bytes:
        with reaching(self.address):
            data: bytes = self._files.cat_file(f"{self._root}/{task}/{name}")
            return data

    def _digest(self, task: str) -> str:
        return self._get(task, DIGEST_NAME)[:64].decode("ascii", "replace").lower()


def digest_line(data: bytes) -> bytes:
    """As ``sha256sum adapter.safetensors`` prints it."""
    return f"{hashlib.sha256(data).hexdigest()}  {FILE_NAME}\n".encode()


def _listed(entries: Mapping[str, Mapping[str, Any]]) -> Listed:
    tags = json.dumps([_tag(entries[name]) for name in (FILE_NAME, DIGEST_NAME) if name in entries])
    size = int(entries[FILE_NAME].get("size") or 0)
    return Listed(size, hashlib.sha256(tags.encode()).hexdigest()[:16], DIGEST_NAME in entries)


def _tag(entry: Mapping[str, Any]) -> list[str]:
    """What tells a version of a file: names of S3, of Google's storage, of the hub, of a file system."""
    names = ("ETag", "etag", "generation", "blob_id", "mtime", "ino", "size")
    return [str(entry[name]) for name in names if entry.get(name) is not None]


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Whatever goes wrong on the way, as an `OSError`: these libraries' exceptions share no base but `Exception`."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, f"there is no {address}, or nothing in it that you may see") from error
    except PermissionError as error:
        raise OSError(errno.EACCES, f"{address} refuses these credentials: {_line(error)}") from error
    except Exception as error:
        raise OSError(errno.EIO, f"{address} cannot be reached: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:200]
