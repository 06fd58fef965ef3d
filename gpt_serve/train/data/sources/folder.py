"""Image folders: ``root/{train,val,test}/<class>/*``."""

from collections.abc import Sequence
from pathlib import Path

from gpt_serve.adapters.file import MAX_LABEL_LENGTH
from gpt_serve.errors import DataError
from gpt_serve.train.data.samples import Dataset, Sample, check_labels, some

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def open_folder(root: Path) -> Dataset:
    """The splits that the folder has; ``train`` is a must.

    Raises:
        DataError: one line that says what is wrong with the folder.
    """
    if not (root / "train").is_dir():
        raise DataError(f"--data {root}: expected a folder train/ with one folder per class")
    labels = _labels(root / "train")
    train = _read_split(root / "train", labels)
    val = _read_split(root / "val", labels) if (root / "val").is_dir() else []
    test = _read_split(root / "test", labels) if (root / "test").is_dir() else []
    return Dataset(labels, train, val, test)


def open_test_folder(root: Path, labels: Sequence[str]) -> list[Sample]:
    """The images of ``root/test``, or of ``root`` itself when it holds class folders; classes may be missing.

    Raises:
        DataError: a class that is not in ``labels``, or no images.
    """
    folder = root / "test" if (root / "test").is_dir() else root
    check_labels(str(folder), labels, _class_folders(folder))
    samples = _read_split(folder, labels, require_all=False)
    if not samples:
        raise DataError(f"--data {folder}: holds no class folders with images")
    return samples


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


def _read_split(folder: Path, labels: Sequence[str], *, require_all: bool = True) -> list[Sample]:
    """All images below ``folder/<class>/``, in name order."""
    check_labels(str(folder), labels, _class_folders(folder))
    samples: list[Sample] = []
    empty: list[str] = []
    for target, label in enumerate(labels):
        paths = sorted(_images(folder / label))
        if not paths:
            empty.append(label)
        samples += [Sample(str(path), path.read_bytes, target) for path in paths]
    if empty and require_all:
        raise DataError(f"{folder}: no images (.jpg, .jpeg, .png, .webp) for class {some(empty)}")
    return samples


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
