"""Folders of pictures and label files: ``root/images/<split>/**/*.jpg`` and ``root/labels/<split>/**/*.png``.

The second folder may be called ``labels``, ``annotations`` or ``masks``, and a split by any of its names in `SPLITS`. A
label file has its picture's name but for the suffix. ``classes.txt`` names the classes, a line for each value from 0
on; ``classes.json`` is such a list or an object from values to names. ADE20K's folder is known by its own list.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt_serve.errors import DataError
from gpt_serve.images.convert import SUFFIXES
from gpt_serve.train.data.samples import SPLITS, check_names, counted, some
from gpt_serve.train.masks.samples import NOTHING, MaskDataset, MaskSample, label_values, local_sample

LABEL_FOLDERS = ("labels", "annotations", "masks")
ADE20K_NAMES = "objectInfo150.txt"
_PEEKED = 20  # label files that are looked at where nothing names the classes


def label_folder(root: Path) -> Path | None:
    """Where the label files lie, if the folder is one of pictures and label files; None if it is none."""
    there = [root / name for name in LABEL_FOLDERS if (root / name).is_dir()]
    return there[0] if (root / "images").is_dir() and there else None


def open_mask_folder(root: Path, ignore: Sequence[int] | None = None) -> MaskDataset:
    """Open the splits that a folder has; it must have ``train``, or, to be measured on, ``test``.

    Args:
        ignore: values of label files that belong to no class; None for 255, and 0 of ADE20K.

    Raises:
        DataError: one line that says what is wrong with the folder.
    """
    labels = label_folder(root)
    if labels is None:
        raise DataError(
            f"--data {root}: expected images/train/*.jpg with labels/train/*.png (or annotations/, masks/ for labels/)"
        )
    splits, unused = _splits(root / "images", labels)
    files = [sample for split in splits.values() for sample in split]
    if not files:
        raise DataError(f"--data {root}: no pictures in images/train, images/val or images/test")
    ade20k = (root / ADE20K_NAMES).is_file()
    ignored = tuple(ignore) if ignore is not None else ((0,) if ade20k else (NOTHING,))
    names = _ade20k_names(root / ADE20K_NAMES) if ade20k else _names(root, files, ignored)
    order = sorted(value for value in names if value not in ignored)
    classes = check_names([names[value] for value in order], str(root))
    values = {value: number for number, value in enumerate(order)}
    return MaskDataset(classes, values, ignored, *(splits.get(split, ()) for split in SPLITS), unused=tuple(unused))


def _splits(images: Path, labels: Path) -> tuple[dict[str, list[MaskSample]], list[str]]:
    """The samples of each split, and lines about folders that are none."""
    known = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
    splits: dict[str, list[MaskSample]] = {}
    others: list[str] = []
    for folder in sorted(path for path in images.iterdir() if path.is_dir()):
        split = known.get(folder.name.lower())
        if split is None:
            others.append(folder.name + "/")
        elif split in splits:
            raise DataError(f"{images} holds two folders of the split {split}: leave one of them")
        else:
            splits[split] = _pairs(folder, _partner_folder(labels, split, folder.name))
    loose = sum(path.suffix.lower() in SUFFIXES for path in images.iterdir() if path.is_file())
    others += [f"{counted(loose, 'picture')} in no folder of a split"] if loose else []
    return splits, [f"not used in {images}: {some(others)}"] if others else []


def _partner_folder(labels: Path, split: str, name: str) -> Path:
    there = [labels / name, *(labels / alias for alias in SPLITS[split])]
    found = next((path for path in there if path.is_dir()), None)
    if found is None:
        raise DataError(f"no folder {labels / name} for the label files of the split {split}: add it")
    return found


def _pairs(images: Path, labels: Path) -> list[MaskSample]:
    """Each picture with its label file.

    Raises:
        DataError: pictures or label files without a partner, of which some are named.
    """
    pictures = {path.relative_to(images).with_suffix(""): path for path in _files(images, SUFFIXES)}
    masks = {path.relative_to(labels).with_suffix(""): path for path in _files(labels, {".png"})}
    for lacking, what, where in (
        (pictures.keys() - masks.keys(), "without a label file", labels),
        (masks.keys() - pictures.keys(), "without a picture", images),
    ):
        if lacking:
            names = some([str(name) for name in sorted(lacking)])
            raise DataError(f"{counted(len(lacking), 'name')} {what} in {where}: {names}; add or remove them")
    return [local_sample(pictures[name], masks[name]) for name in sorted(pictures)]


def _files(folder: Path, suffixes: frozenset[str] | set[str]) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _names(root: Path, files: Sequence[MaskSample], ignored: Sequence[int]) -> Mapping[int, str]:
    """What each value of a label file is called.

    Raises:
        DataError: there are no names, with what to write; or the list of them is not what it must be.
    """
    text, listed = root / "classes.txt", root / "classes.json"
    if listed.is_file():
        return _from_json(listed)
    if text.is_file():
        lines = text.read_text(encoding="utf-8").splitlines()
        return {value: line.strip() for value, line in enumerate(lines) if line.strip()}
    seen = _values_seen(files, ignored)
    raise DataError(
        f"--data {root}: nothing says what the values of label files mean (found {seen}): write {text} with "
        "a line for each class, from value 0 on, and name values without a class by --ignore"
    )


def _values_seen(files: Sequence[MaskSample], ignored: Sequence[int]) -> str:
    seen: set[int] = set()
    for sample in files[:: max(1, len(files) // _PEEKED)]:
        seen |= set(label_values(sample.read_labels()).ravel().tolist())
    return some([str(value) for value in sorted(seen - set(ignored))])


def _from_json(path: Path) -> dict[int, str]:
    advice = f'{path}: expected a list of names, or an object such as {{"1": "road", "2": "sky"}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = enumerate(content) if isinstance(content, list) else ((int(key), content[key]) for key in content)
        names = {value: name for value, name in pairs if isinstance(name, str)}
    except (ValueError, TypeError) as error:
        raise DataError(advice) from error
    if len(names) != len(content) or not all(0 <= value <= 255 for value in names):
        raise DataError(advice)
    return names


def _ade20k_names(path: Path) -> dict[int, str]:
    """The 150 names that ADE20K's own table has in its last column, from value 1 on."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return {int(row[0]): row[-1].strip() for row in rows}
