"""Labelled images of one task, as every source of data hands them over."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import overload
from unicodedata import category, normalize

import numpy as np
import torch
from torch import Tensor

from gpt_serve.adapters.parse import MAX_LABEL_LENGTH
from gpt_serve.errors import DataError, ImageError
from gpt_serve.images.convert import read_image
from gpt_serve.images.decode import LOCAL_LIMITS, decode

HELD_OUT = 0.2  # of each class

SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""What data sets call each split, in lower case."""

# Control characters, halves of surrogate pairs (a file name that is not UTF-8), separators of lines and paragraphs.
# What only joins, parts or directs characters, such as ZWNJ and the no-break space, belongs to names of many languages.
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        name: what to call it in messages: its path, or its place in a data set.
        read: returns the bytes of its file, in a format that the decoder takes.
        target: the index of its class; of several labels the first, which stands for the image where one class must.
        others: the indices of its other labels, in a task with several for each image.
    """

    name: str
    read: Callable[[], bytes]
    target: int
    others: tuple[int, ...] = ()

    @property
    def targets(self) -> tuple[int, ...]:
        """All of its labels."""
        return self.target, *self.others


Split = Sequence[Sample]


def local_sample(path: Path, target: int, others: tuple[int, ...] = ()) -> Sample:
    """The sample of an image file, which may be in any format that `gpt_serve.images.convert.readable` takes."""
    return Sample(str(path), partial(read_image, path), target, others)


def multi_hot(samples: Sequence[Sample], classes: int) -> Tensor:
    """int64 (n, C), 1 for each label that a sample has."""
    rows = torch.zeros(len(samples), classes, dtype=torch.int64)
    for row, sample in zip(rows, samples, strict=True):
        row[list(sample.targets)] = 1
    return rows


def short_name(name: str) -> str:
    """The end of an image's name: split, class and file of a path."""
    return "/".join(Path(name).parts[-3:])


def reason(error: Exception) -> str:
    """Say why an image cannot be read, without its path, which the message names anyway."""
    return str(getattr(error, "strerror", None) or error)


def cannot_read(sample: Sample, error: Exception) -> DataError:
    """The error for an image that cannot be read and cannot be left out."""
    return DataError(f"cannot read {sample.name}: {reason(error)}; replace or remove it")


def decoded(sample: Sample, *, exif: bool) -> Tensor:
    """Read and decode an image that cannot be left out.

    Args:
        exif: whether to apply the EXIF orientation.

    Returns:
        uint8 (3, h, w) RGB.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return decode(sample.read(), LOCAL_LIMITS, exif=exif)
    except (ImageError, OSError) as error:
        raise cannot_read(sample, error) from error


@dataclass(frozen=True)
class Indexed(Sequence[Sample]):
    """Samples of a data set that a library holds; each is made when it is asked for.

    Attributes:
        name: name of the split; images are called ``name/index`` in messages.
        read: returns the bytes of the image at an index of the library's.
        targets: the class of the image at each index of the library's.
        indices: the library's indices of these samples, in order.
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
    """The splits of one task's images; splits that the source lacks are empty.

    Attributes:
        labels: names of the classes, which the samples' ``target`` indexes.
        unused: a line for each thing that the source holds and that is in no split.
        multi_label: whether images have several labels.
    """

    labels: tuple[str, ...]
    train: Split = ()
    val: Split = ()
    test: Split = ()
    unused: tuple[str, ...] = field(default=(), kw_only=True)
    multi_label: bool = field(default=False, kw_only=True)


def pick(samples: Split, indices: Sequence[int]) -> Split:
    """Take the samples at ``indices``, in that order."""
    if isinstance(samples, Indexed):
        return replace(samples, indices=[samples.indices[index] for index in indices])
    return [samples[index] for index in indices]


def rank_in_class(targets: np.ndarray) -> np.ndarray:
    """Number the images of each class: ``rank[i] = (targets[:i] == targets[i]).sum()``.

    Args:
        targets: (n,) integers from 0.

    Returns:
        (n,) integers.
    """
    counts = np.bincount(targets)
    by_class = np.argsort(targets, kind="stable")
    ranks = np.empty_like(targets)
    ranks[by_class] = np.arange(len(targets)) - (np.cumsum(counts) - counts)[targets[by_class]]
    return ranks


def hold_out(
    samples: Split, labels: Sequence[str], seed: int, source: str, what: str = "validation"
) -> tuple[Split, Split]:
    """Hold a fifth of each class out; the same seed holds the same images out.

    Args:
        source: the value of ``--data``, for messages.
        what: the split that the data set lacks.

    Returns:
        The samples that are left, and those that are held out.

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


def hold_out_any(samples: Split, seed: int) -> tuple[Split, Split]:
    """Hold a fifth of the images out, whatever their labels, as `hold_out` does class by class."""
    order = np.random.default_rng(seed).permutation(len(samples))
    count = max(1, round(HELD_OUT * len(samples)))
    return pick(samples, sorted(order[count:].tolist())), pick(samples, sorted(order[:count].tolist()))


def without_splits(samples: Split, labels: tuple[str, ...], source: str) -> Dataset:
    """Make a data set of samples that are published without splits.

    A fifth of each class is held out for test; it is the same fifth for every seed of training.

    Raises:
        DataError: a class has a single image.
    """
    rest, test = hold_out(samples, labels, 0, source, "test")
    return Dataset(labels, rest, test=test)


def check_names(labels: Sequence[str], source: str) -> tuple[str, ...]:
    """Check that an adapter can store ``labels``, and return them in Unicode's composed form (NFC).

    Raises:
        DataError: there are fewer than two, two are the same, or one has no or too many characters, or such as cannot
            be shown.
    """
    if len(labels) < 2:
        raise DataError(f"--data {source} has a single class: it takes at least two")
    if bad := [label for label in labels if not _is_label(label)]:
        raise DataError(f"--data {source} has a class whose name cannot be a label: rename {bad[0][:60]!r}")
    composed = [composed_name(label) for label in labels]
    if twice := [label for label, count in Counter(composed).items() if count > 1]:
        raise DataError(f"--data {source} has two classes of the name {min(twice)!r}: rename one")
    return tuple(composed)


def _is_label(name: str) -> bool:
    return 1 <= len(name) <= MAX_LABEL_LENGTH and not any(category(character) in _NO_TEXT for character in name)


def composed_name(label: str) -> str:
    """Compose the characters of a name (Unicode's NFC), which makes its spellings equal."""
    return normalize("NFC", label)


def check_labels(where: str, expected: Sequence[str], found: Sequence[str]) -> None:
    """Raise `DataError` if ``found`` has classes that training did not see."""
    if unknown := sorted({composed_name(label) for label in found} - {composed_name(label) for label in expected}):
        raise DataError(f"{where} holds classes that training did not see: {some(unknown)}")


def some(names: Sequence[str]) -> str:
    """Join the first five names, and say how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def counted(number: int, noun: str) -> str:
    """Count a noun, as in ``1 image`` and ``2 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def digest(hashes: Sequence[tuple[str, int, str]]) -> str:
    """SHA-256 (hex) of all images, which does not depend on their order.

    Args:
        hashes: of each image ``split/label``, its place in the split, and the SHA-256 (hex) of its bytes.
    """
    total = hashlib.sha256()
    for item in sorted(hashes):
        total.update(repr(item).encode())
    return total.hexdigest()
