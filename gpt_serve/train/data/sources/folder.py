"""Image folders, ``root/<split>/<class>/**/*``: the images in them, and lines that say what is not used.

A split's folder may go by any of its names in `SPLITS`, in lower or upper case. An image belongs to the class whose
folder it lies in, however deep below. A file is an image if it is named or begins like one.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt_serve.errors import DataError
from gpt_serve.images.convert import HEAD_BYTES, SUFFIXES, is_image, is_of_system
from gpt_serve.train.data.samples import (
    SPLITS,
    Dataset,
    Sample,
    check_labels,
    check_names,
    composed_name,
    counted,
    local_sample,
    some,
)

_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


@dataclass
class Leftovers:
    """What the folder of a split holds that is not used.

    Attributes:
        folders: names of folders that belong to the system or are hidden.
        loose: number of images that lie beside the class folders.
        others: how many files are no images, by the ends of their names.
    """

    folders: set[str] = field(default_factory=set)
    loose: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def lines(self, split: str) -> list[str]:
        """Say what is not used, a line for each kind of it."""
        found = []
        if self.others:
            kinds = [f"{suffix or 'without a suffix'} {count}" for suffix, count in self.others.most_common()]
            found.append(f"files that are no images ({some(kinds)})")
        if self.loose:
            found.append(f"{counted(self.loose, 'image')} in no class folder")
        if self.folders:
            found.append(f"what lies in {some(sorted(self.folders))}")
        return [f"not used in {split}/: {line}" for line in found]


def open_folder(root: Path) -> Dataset:
    """Open the splits that a folder has.

    It must have ``train``, with images of every class; classes may be missing in ``val`` and ``test``.

    Raises:
        DataError: one line that says what is wrong with the folder.
    """
    folders, unused = _split_folders(root)
    if "train" not in folders:
        raise DataError(f"--data {root}: expected a folder train/ with one folder per class")
    classes = {split: _class_folders(folder) for split, folder in folders.items()}
    labels = _labels(folders["train"], classes["train"])
    splits: dict[str, list[Sample]] = {}
    for split, folder in folders.items():
        splits[split], left = _read_split(folder, classes[split], labels)
        if split == "train":
            _check_train(folder, splits[split], labels, left)
        unused += left.lines(folder.name)
        if not splits[split]:
            unused.append(f"not used: {folder.name}/, which has no images in class folders")
    return Dataset(labels, *(splits.get(split, ()) for split in SPLITS), unused=tuple(unused))


def _check_train(folder: Path, samples: Sequence[Sample], labels: Sequence[str], left: Leftovers) -> None:
    """Raise `DataError` if a class has no images; what is there instead may tell why."""
    counts = Counter(sample.target for sample in samples)
    if empty := [label for target, label in enumerate(labels) if not counts[target]]:
        trouble = f"{folder}: no images (.jpg, .png, .webp, .tif, ...) for class {some(empty)}"
        raise DataError("; ".join([trouble, *left.lines(folder.name)]))


def open_test_folder(root: Path, labels: Sequence[str]) -> Dataset:
    """Open the images of ``root/test``, or of ``root`` itself if it holds class folders; classes may be missing.

    Raises:
        DataError: a class that is not in ``labels``, or no images.
    """
    splits, _ = _split_folders(root)
    folder = splits.get("test", root)
    classes = _class_folders(folder)
    if folder == root and not set(classes) <= {composed_name(label) for label in labels} and "train" in splits:
        raise DataError(f"--data {root} has no folder test/: add one, or name a folder of class folders")
    samples, left = _read_split(folder, classes, labels)
    if not samples:
        raise DataError(f"--data {folder}: holds no class folders with images")
    return Dataset(tuple(labels), test=samples, unused=tuple(left.lines(folder.name)))


def _split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Find the folder of each split, and say what else is there, in lines.

    Raises:
        DataError: two folders of the same split.
    """
    names = {name: split for split, aliases in SPLITS.items() for name in aliases}
    found: dict[str, Path] = {}
    others: list[str] = []
    loose = 0
    for entry in _entries(root):
        split = names.get(entry.name.lower())
        if not entry.is_dir():
            loose += Path(entry.name).suffix.lower() in SUFFIXES
        elif split is None:
            others += [] if is_of_system(entry.name) else [f"{entry.name}/"]
        elif split in found:
            raise DataError(f"--data {root} holds both {found[split].name}/ and {entry.name}/: leave one of them")
        else:
            found[split] = Path(entry.path)
    others += [f"{counted(loose, 'image')} in no folder"] if loose else []
    unused = f"not used: {some(others)}; the splits are " + ", ".join(f"{path.name}/" for path in found.values())
    return {split: found[split] for split in SPLITS if split in found}, [unused] if others else []


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """Find the folders of each class, by its composed name; each spelling of the name may have a folder."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for entry in _entries(folder):
        if entry.is_dir() and not is_of_system(entry.name):
            found[composed_name(entry.name)].append(Path(entry.path))
    return dict(sorted(found.items()))


def _labels(folder: Path, classes: Mapping[str, object]) -> tuple[str, ...]:
    if not classes:
        raise DataError(f"{folder} holds no class folders: expected {folder}/<class>/*.jpg")
    if len(classes) == 1:
        raise DataError(f"{folder} holds a single class ({min(classes)}): add at least one more class folder")
    return check_names(list(classes), str(folder))


def _read_split(
    folder: Path, classes: Mapping[str, Sequence[Path]], labels: Sequence[str]
) -> tuple[list[Sample], Leftovers]:
    """Find all images below the class folders, class by class, in the order of their paths."""
    check_labels(str(folder), labels, list(classes))
    left = Leftovers()
    for entry in _entries(folder):
        if not entry.is_dir():
            left.loose += _is_wanted(entry, left)
        elif is_of_system(entry.name):
            left.folders.add(entry.name)
    samples: list[Sample] = []
    for target, label in enumerate(labels):
        of_class = classes.get(composed_name(label), ())
        paths = sorted(path for below in of_class for path in _images(below, left, frozenset()))
        samples += [local_sample(path, target) for path in paths]
    return samples, left


def _images(folder: Path, left: Leftovers, above: frozenset[str]) -> Iterator[Path]:
    """Find all images below a folder. Links are followed, but not to a folder that lies ``above``."""
    above |= {os.path.realpath(folder)}
    for entry in _entries(folder):
        if entry.is_dir():
            if is_of_system(entry.name):
                left.folders.add(entry.name)
            elif os.path.realpath(entry.path) not in above:
                yield from _images(Path(entry.path), left, above)
        elif _is_wanted(entry, left):
            yield Path(entry.path)


def _is_wanted(entry: "os.DirEntry[str]", left: Leftovers) -> bool:
    """Whether a file is an image. One that is none is counted in ``left``, unless it is hidden or the system's."""
    if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
        return False
    suffix = Path(entry.name).suffix.lower()
    if suffix in SUFFIXES or _begins_like_an_image(entry):
        return True
    left.others[suffix] += 1
    return False


def _begins_like_an_image(entry: "os.DirEntry[str]") -> bool:
    if not entry.is_file():
        return False
    try:
        with open(entry.path, "rb") as file:
            return is_image(file.read(HEAD_BYTES))
    except OSError as error:
        raise DataError(f"{entry.path} cannot be read: {error.strerror}") from error


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    """List a folder, in the order of names."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
