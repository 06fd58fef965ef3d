"""Labelled images: folders and built-in datasets, their splits, and the check that every image can be read."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from gpt_serve.adapter_file import MAX_LABEL_LENGTH
from gpt_serve.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
VAL_FRACTION = 0.2


@dataclass(frozen=True)
class Sample:
    """One labelled image: a name to report it by, how to read its bytes, the index of its class."""

    name: str
    read: Callable[[], bytes]
    target: int


Split = Sequence[Sample]


@dataclass(frozen=True)
class Dataset:
    """Splits of one task; ``test`` is empty when there is none. ``target`` indexes ``labels``."""

    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split


def open_dataset(source: str, seed: int) -> Dataset:
    """Open an image folder ``source/{train,val,test}/<class>/*`` or the built-in ``digits``.

    Without a ``val`` folder, a fifth of each class of ``train`` is held out by ``seed``.

    Raises:
        DataError: one line that says what is wrong with the folder.
    """
    root = Path(source)
    if source == "digits" and not root.exists():
        labels, train, test = _digits()
        held = _hold_out(train, labels, seed, source)
        return Dataset(labels, held[0], held[1], test)
    if not root.is_dir():
        raise DataError(f"--data {source}: no such folder, and no built-in dataset of that name (digits)")
    if not (root / "train").is_dir():
        raise DataError(f"--data {source}: expected a folder train/ with one folder per class")
    labels = _labels(root / "train")
    train = _read_split(root / "train", labels)
    val = _read_split(root / "val", labels) if (root / "val").is_dir() else []
    test = _read_split(root / "test", labels) if (root / "test").is_dir() else []
    if not val:
        train, val = _hold_out(train, labels, seed, source)
    return Dataset(labels, train, val, test)


def open_evaluation(source: str, labels: Sequence[str]) -> Split:
    """The images that ``eval`` uses: ``source/test``, or ``source`` itself when it holds class folders.

    Raises:
        DataError: no such folder, or a class that the adapter does not know.
    """
    root = Path(source)
    if source == "digits" and not root.exists():
        known, _, test = _digits()
        _check_labels("digits", labels, known)
        return test
    if not root.is_dir():
        raise DataError(f"--data {source}: no such folder, and no built-in dataset of that name (digits)")
    folder = root / "test" if (root / "test").is_dir() else root
    _check_labels(str(folder), labels, _class_folders(folder))
    samples = _read_split(folder, labels, require_all=False)
    if not samples:
        raise DataError(f"--data {folder}: holds no class folders with images")
    return samples


def digest(hashes: Sequence[tuple[str, int, str]]) -> str:
    """SHA-256 over (name, target, SHA-256 of the bytes) of all images, whatever their order."""
    total = hashlib.sha256()
    for item in sorted(hashes):
        total.update(repr(item).encode())
    return total.hexdigest()


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error


def _labels(folder: Path) -> tuple[str, ...]:
    labels = tuple(_class_folders(folder))
    if not labels:
        raise DataError(f"{folder} holds no class folders: expected {folder}/<class>/*.jpg")
    if len(labels) == 1:
        raise DataError(f"{folder} holds a single class ({labels[0]}): add at least one more class folder")
    bad = [label for label in labels if len(label) > MAX_LABEL_LENGTH or not label.isprintable()]
    if bad:
        raise DataError(f"{folder} holds a class folder whose name cannot be a label: rename {bad[0][:60]!r}")
    return labels


def _check_labels(where: str, expected: Sequence[str], found: Sequence[str]) -> None:
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise DataError(f"{where} holds classes that training did not see: {_some(unknown)}")


def _read_split(folder: Path, labels: Sequence[str], *, require_all: bool = True) -> list[Sample]:
    """All images below ``folder/<class>/``, in name order."""
    _check_labels(str(folder), labels, _class_folders(folder))
    samples: list[Sample] = []
    empty: list[str] = []
    for target, label in enumerate(labels):
        paths = sorted(_images(folder / label))
        if not paths:
            empty.append(label)
        samples += [Sample(str(path), path.read_bytes, target) for path in paths]
    if empty and require_all:
        raise DataError(f"{folder}: no images (.jpg, .jpeg, .png, .webp) for class {_some(empty)}")
    return samples


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]


def _hold_out(samples: Split, labels: Sequence[str], seed: int, source: str) -> tuple[list[Sample], list[Sample]]:
    """Split into train and val, stratified by class, the same for the same seed."""
    counts = Counter(sample.target for sample in samples)
    small = [labels[target] for target, count in sorted(counts.items()) if count < 2]
    if small:
        raise DataError(
            f"--data {source}: no val/ folder and too few images (1) to hold one out of class {_some(small)}"
        )
    chosen: set[int] = set()
    rng = np.random.default_rng(seed)
    for target in range(len(labels)):
        indices = [index for index, sample in enumerate(samples) if sample.target == target]
        size = max(1, round(VAL_FRACTION * len(indices)))
        chosen.update(rng.permutation(indices)[:size].tolist())
    train = [sample for index, sample in enumerate(samples) if index not in chosen]
    return train, [samples[index] for index in sorted(chosen)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _digits() -> tuple[tuple[str, ...], list[Sample], list[Sample]]:
    """scikit-learn's 1,797 handwritten digits (8x8 grey) as PNG, every fifth of a class held out for test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train: list[Sample] = []
    test: list[Sample] = []
    seen: Counter[int] = Counter()
    for index, (pixels, target) in enumerate(zip(bunch.images, bunch.target.tolist(), strict=True)):
        sample = Sample(f"digits/{index}", partial(_digit_png, pixels), target)
        (test if seen[target] % 5 == 4 else train).append(sample)
        seen[target] += 1
    return tuple(str(digit) for digit in range(10)), train, test


def _digit_png(pixels: np.ndarray) -> bytes:
    """(8, 8) values 0..16 as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
