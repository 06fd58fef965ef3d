"""The published splits of the FGVC five and of VTAB-1K's 19 tasks: image files, and lists that name them.

FGVC, as Jia et al. (Visual Prompt Tuning) split it: ``fgvc/<folder>/{train,val,test}.json`` map an image's path to the
id of its class. VTAB-1K, as it is passed on: ``vtab-1k/<folder>/{train800,val200,test}.txt`` hold a line
``path class`` for each image. Either folder may hold ``labels.txt``, a name for each class in order.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_serve.errors import DataError
from gpt_serve.train.data.samples import Dataset, Sample, check_names, local_sample
from gpt_serve.train.data.sources.published import published
from gpt_serve.train.data.sources.root import data_root
from gpt_serve.train.recipes.paper_table import find_task

VTAB_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}

Listed = list[tuple[str, int]]  # path of an image below its folder, class


def open_fgvc(task: str) -> Dataset:
    """Open one of ``cub``, ``nabirds``, ``flowers``, ``cars`` and ``dogs``.

    Classes are the ids of ``train.json`` in order. A class is named by ``labels.txt``, or by the folder that holds all
    of its images and no others, or else by its id.

    Raises:
        DataError: the folder is missing, or a list does not match it.
    """
    entry = published("fgvc")["tasks"][task]
    get = f"{entry['get']}, {published('fgvc')['get']}"
    folder = _folder("fgvc", task, entry["folder"], get)
    files = {split: folder / f"{split}.json" for split in ("train", "val", "test")}
    lists = {split: _read_json(path) for split, path in files.items()}
    ids = sorted({number for _, number in lists["train"]})
    labels = _labels(folder, len(ids)) or _names(lists["train"]) or tuple(str(number) for number in ids)
    position = {number: target for target, number in enumerate(ids)}
    return _dataset(folder / entry["images"], labels, files, lists, position)


def open_vtab(task: str) -> Dataset:
    """Open one of the 19 tasks by its name in ``paper_table.toml``: 800 images to train, 200 to validate, and the test
    images.

    Raises:
        DataError: the folder is missing, or a list does not match it.
    """
    entry = published("vtab")["tasks"][task]
    folder = _folder("vtab", task, entry["folder"], published("vtab")["get"])
    classes = entry["classes"]
    files = {split: folder / name for split, name in VTAB_LISTS.items()}
    lists = {split: _read_list(path) for split, path in files.items()}
    labels = _labels(folder, classes) or tuple(str(number) for number in range(classes))
    return _dataset(folder, labels, files, lists, {number: number for number in range(classes)})


def _folder(kind: str, task: str, usual: str, get: str) -> Path:
    """Find the folder of the task, by its usual name or by any other that the paper's table has for the task."""
    root = data_root() / {"fgvc": "fgvc", "vtab": "vtab-1k"}[kind]
    expected = root / usual
    if expected.is_dir():
        return expected
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if (find_task(folder.name) or ("",))[0] == task and folder.is_dir():
            return folder
    raise DataError(
        f"--data {kind}/{task}: {expected} is missing: put there {get} (GPT_SERVE_DATA moves {root.parent})"
    )


def _read_json(path: Path) -> Listed:
    try:
        content: Any = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): get it anew") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} must map paths of images to class ids, in one JSON object")
    for name, number in content.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise DataError(f"{path}: the class id of {name!r} is {number!r:.40}, not an integer")
    return list(content.items())


def _read_list(path: Path) -> Listed:
    listed: Listed = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, target = line.strip().rpartition(" ")
        if not name or not target.isdecimal():
            raise DataError(f"{path}, line {number}: {line!r:.80} is not 'path class'")
        listed.append((name.strip(), int(target)))
    if not listed:
        raise DataError(f"{path} lists no images: get it anew")
    return listed


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: this split was not published without it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from error


def _labels(folder: Path, classes: int) -> tuple[str, ...]:
    path = folder / "labels.txt"
    if not path.exists():
        return ()
    labels = _text(path).splitlines()
    if len(labels) != classes:
        raise DataError(f"{path} has {len(labels)} lines for {classes} classes: it takes one name a line, in order")
    return tuple(labels)


def _names(listed: Listed) -> tuple[str, ...]:
    """Name each class, in the order of ids, by the folder of its images.

    Returns:
        Nothing unless every class has a folder of its own.
    """
    folders: defaultdict[int, set[str]] = defaultdict(set)
    for name, number in listed:
        folders[number].add(Path(name).parent.name)
    names = [min(found) for _, found in sorted(folders.items()) if len(found) == 1]
    return tuple(names) if len(set(names)) == len(folders) else ()


def _dataset(
    images: Path,
    labels: Sequence[str],
    files: Mapping[str, Path],
    lists: Mapping[str, Listed],
    position: Mapping[int, int],
) -> Dataset:
    """Make the samples that the lists name.

    Args:
        images: the folder that paths in the lists start from.
        files: the path of each list, for messages.
        position: the target of each class of the lists.
    """
    splits: dict[str, list[Sample]] = {}
    for split, listed in lists.items():
        for name, number in listed:
            if number not in position:
                raise DataError(f"{files[split]}: class {number} of {name!r} is none of the {len(labels)} classes")
            if not os.path.isfile(images / name):
                raise DataError(f"{files[split]} names {name!r}, which {images} lacks: list and images do not match")
        splits[split] = [local_sample(images / name, position[number]) for name, number in listed]
    return Dataset(check_names(labels, str(images)), splits["train"], splits["val"], splits["test"])
