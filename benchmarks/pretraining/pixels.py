"""All images of an archive or a folder as one uint8 array on disk, decoded once."""

import hashlib
import lzma
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpt_serve.errors import DataError, ImageError
from gpt_serve.images.decode import LOCAL_LIMITS, decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.sources.folder import SUFFIXES


@dataclass(frozen=True)
class Entry:
    """One image of the source; ``read`` works while the source is at this entry."""

    name: str
    size: int
    changed: int
    read: Callable[[], bytes]


def load_pixels(source: Path, splits: Sequence[str], scaling: Preprocess, cache: Path) -> tuple[Tensor, str]:
    """Every image below ``train/`` or another of ``splits``, in the source's order.

    Args:
        source: a tar archive, of any compression, or a folder; ``splits`` are folders at its first or second level.
        scaling: gives the size that images of other sizes are scaled to.
        cache: folder where the decoded images are kept.

    Returns:
        uint8 (N, 3, H, W), mapped from the file, and 12 hex digits that name the images by name, size and time.

    Raises:
        DataError: the source has no such images, one is damaged, or there is no room for them.
    """
    listing = [(entry.name, entry.size, entry.changed) for entry in _entries(source, splits)]
    if not listing:
        raise DataError(f"--data {source}: no images below {' or '.join(f'{split}/' for split in splits)}")
    digest = hashlib.sha256(repr((scaling.input_size, listing)).encode()).hexdigest()[:12]
    path = cache / f"pixels-{digest}.npy"
    if not path.exists():
        _decode(_entries(source, splits), (len(listing), 3, *scaling.input_size), scaling, path)
    return torch.from_numpy(np.load(path, mmap_mode="c")), digest


def _entries(source: Path, splits: Sequence[str]) -> Iterator[Entry]:
    if not source.exists():
        raise DataError(f"--data {source}: no such archive or folder")
    found = _files(source) if source.is_dir() else _members(source)
    for entry in found:
        parts = PurePosixPath(entry.name).parts
        if set(parts[:2]) & set(splits) and PurePosixPath(entry.name).suffix.lower() in SUFFIXES:
            yield entry


def _files(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            yield Entry(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns, path.read_bytes)


def _members(archive: Path) -> Iterator[Entry]:
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if member.isfile():
                    yield Entry(member.name, member.size, int(member.mtime), partial(_extract, tar, member))
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"--data {archive}: not a tar archive, or a damaged one ({error}); fetch it anew") from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None  # a regular file
    return stream.read()


def _decode(entries: Iterator[Entry], shape: tuple[int, ...], scaling: Preprocess, path: Path) -> None:
    """Write an ``.npy`` of ``shape``, front to back: a full disk is an error here, and would be a signal in a map."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if need > free:
            raise DataError(f"{path.parent} has {free / 1e6:.0f} MB free and needs {need / 1e6:.0f}: choose another")
        with temporary.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for entry in tqdm(entries, "decoding", shape[0], disable=None, unit=" images", leave=False):
                file.write(_pixels(entry, scaling).numpy().tobytes())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"the images cannot be decoded into {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _pixels(entry: Entry, scaling: Preprocess) -> Tensor:
    try:
        return preprocess_image(decode(entry.read(), LOCAL_LIMITS), scaling)
    except ImageError as error:
        raise DataError(f"cannot read {entry.name}: {error}") from error
