"""Labelled images of one task: what every source of data hands over."""

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import overload

import numpy as np
from PIL import Image

from gpt_serve.adapters.file import MAX_LABEL_LENGTH
from gpt_serve.errors import DataError, UnsupportedImage
from gpt_serve.images.headers import identify

HELD_OUT = 0.2  # of each class


@dataclass(frozen=True)
class Sample:
    """One labelled image: a name to report it by, how to read its bytes, the index of its class."""

    name: str
    read: Callable[[], bytes]
    target: int


Split = Sequence[Sample]


@dataclass(frozen=True)
class Indexed(Sequence[Sample]):
    """Samples of a library's data set, made when they are asked for.

    Attributes:
        name: of the split, to report images by.
        read: the bytes of the image at an index of the library's.
        targets: the class of each index.
        indices: which of them, in order.
    """

    name: str
    read: Callable[[int], bytes]
    targets: Sequence[int]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Indexed": ...
    def __getitem__(self, index: int | slice) -> "Sample | Indexed":
        if isinstance(index, slice):
            return replace(self, indices=self.indices[index])
        place = self.indices[index]
        return Sample(f"{self.name}/{place}", partial(self.read, place), self.targets[place])


@dataclass(frozen=True)
class Dataset:
    """Splits of one task; those that it lacks are empty. ``target`` indexes ``labels``."""

    labels: tuple[str, ...]
    train: Split = ()
    val: Split = ()
    test: Split = ()


def pick(samples: Split, indices: Sequence[int]) -> Split:
    """Some of the samples, in the order of ``indices``."""
    if isinstance(samples, Indexed):
        return replace(samples, indices=[samples.indices[index] for index in indices])
    return [samples[index] for index in indices]


def rank_in_class(targets: np.ndarray) -> np.ndarray:
    """(n,): how many of the targets before each are the same, for integers from 0."""
    counts = np.bincount(targets)
    by_class = np.argsort(targets, kind="stable")
    ranks = np.empty_like(targets)
    ranks[by_class] = np.arange(len(targets)) - (np.cumsum(counts) - counts)[targets[by_class]]
    return ranks


def hold_out(
    samples: Split, labels: Sequence[str], seed: int, source: str, what: str = "validation"
) -> tuple[Split, Split]:
    """Split in two, a fifth of each class in the second; the same for the same seed.

    Args:
        source: the value of ``--data``, for messages.
        what: the split that the data set lacks.

    Raises:
        DataError: a class has a single image.
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        members[sample.target].append(index)
    if small := [labels[target] for target, indices in sorted(members.items()) if len(indices) < 2]:
        raise DataError(
            f"--data {source}: no {what} split, and too few images (1) to hold one out of class {some(small)}"
        )
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    for _, indices in sorted(members.items()):
        chosen.update(rng.permutation(indices)[: max(1, round(HELD_OUT * len(indices)))].tolist())
    return pick(samples, [index for index in range(len(samples)) if index not in chosen]), pick(samples, sorted(chosen))


def without_splits(samples: Split, labels: tuple[str, ...], source: str) -> Dataset:
    """A data set that publishes no splits: a fifth of each class is for test, the same one for every seed of training.

    Raises:
        DataError: a class has a single image.
    """
    rest, test = hold_out(samples, labels, 0, source, "test")
    return Dataset(labels, rest, test=test)


def check_names(labels: Sequence[str], source: str) -> tuple[str, ...]:
    """``labels`` if an adapter can store them.

    Raises:
        DataError: fewer than two, two alike, or one that cannot be printed.
    """
    if len(labels) < 2:
        raise DataError(f"--data {source} has a single class: it takes at least two")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise DataError(f"--data {source} has two classes of the name {twice[0]!r}: rename one")
    if bad := [label for label in labels if not label or len(label) > MAX_LABEL_LENGTH or not label.isprintable()]:
        raise DataError(f"--data {source} has a class whose name cannot be a label: rename {bad[0][:60]!r}")
    return tuple(labels)


def check_labels(where: str, expected: Sequence[str], found: Sequence[str]) -> None:
    """Raise `DataError` if ``found`` has classes that training did not see."""
    if unknown := sorted(set(found) - set(expected)):
        raise DataError(f"{where} holds classes that training did not see: {some(unknown)}")


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def png(image: Image.Image, level: int = 1) -> bytes:
    """The pixels as a PNG file, without loss; level 1 is fast, 9 small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def readable(data: bytes) -> bytes:
    """The file itself if it is JPEG, PNG or WebP, which is all that `decode` takes; else its pixels as PNG.

    Raises:
        OSError: Pillow cannot read it, or has too many pixels to.
    """
    try:
        identify(data)
    except UnsupportedImage:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return png(image)
        except Image.DecompressionBombError as error:
            raise OSError(str(error)) from error
    return data


def digest(hashes: Sequence[tuple[str, int, str]]) -> str:
    """SHA-256 over (name, target, SHA-256 of the bytes) of all images, whatever their order."""
    total = hashlib.sha256()
    for item in sorted(hashes):
        total.update(repr(item).encode())
    return total.hexdigest()
