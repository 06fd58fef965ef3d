"""Images with several labels each: ``labels.csv`` in a folder, or in its ``train``, ``val`` and ``test``.

A line for each image: its path from the folder of the table, then its labels, at least one::

    beach/1.jpg,sea,people
    2.jpg,dog

A first line that begins with ``file`` is a heading.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt_serve.errors import DataError
from gpt_serve.train.data.samples import SPLITS, Dataset, Sample, check_labels, check_names, composed_name, local_sample

NAME = "labels.csv"
HEADING = "file"

Table = Mapping[str, Sequence[str]]
"""Paths of images as the table has them, and the labels of each."""


def has_tables(root: Path) -> bool:
    """Whether the images of a folder are labelled by tables."""
    return (root / NAME).is_file() or any(folder is not None for folder in _folders(root).values())


def open_tables(root: Path) -> Dataset:
    """Open the images that ``root/labels.csv`` names, or those of the tables in the splits' folders.

    Raises:
        DataError: one line that says what is wrong with a table.
    """
    folders = {"train": root} if (root / NAME).is_file() else _folders(root)
    train = folders.get("train")
    if train is None:
        raise DataError(f"--data {root}: expected {root / 'train' / NAME} beside the other tables")
    tables = {split: (folder, read_table(folder)) for split, folder in folders.items() if folder is not None}
    found = {composed_name(label) for labels in tables["train"][1].values() for label in labels}
    labels = check_names(sorted(found), str(train))
    splits = {split: _samples(folder, table, labels) for split, (folder, table) in tables.items()}
    return Dataset(labels, *(splits.get(split, ()) for split in SPLITS), multi_label=True)


def open_test_table(root: Path, labels: Sequence[str]) -> Dataset:
    """Open the images of the table of ``root/test``, or of ``root`` itself.

    Raises:
        DataError: as `open_tables`, or a label that is not among ``labels``.
    """
    folder = _folders(root).get("test") or root
    return Dataset(tuple(labels), test=_samples(folder, read_table(folder), labels), multi_label=True)


def read_table(folder: Path) -> Table:
    """The images of ``folder/labels.csv``.

    Raises:
        DataError: it cannot be read, names an image twice or one that is not there, or has an empty label or none.
    """
    path = folder / NAME
    table: dict[str, list[str]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if not row or (number == 1 and row[0].strip().lower() == HEADING):
                    continue
                name, labels = row[0].strip(), [label.strip() for label in row[1:]]
                _check_row(folder, name, labels, table, f"{path}, line {number}")
                table[name] = labels
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a table in UTF-8, separated by commas"
        raise DataError(f"{path} cannot be read: {reason}") from error
    if not table:
        raise DataError(f"{path} names no image: give each a line such as 1.jpg,label,label")
    return table


def _check_row(folder: Path, name: str, labels: Sequence[str], before: Table, where: str) -> None:
    if not labels:
        raise DataError(f"{where}: {name!r:.80} has no label: give it at least one")
    if not all(labels):
        raise DataError(f"{where}: {name!r:.80} has an empty label: remove the comma too many")
    if len(set(labels)) != len(labels):
        raise DataError(f"{where}: {name!r:.80} has a label twice: remove one")
    if name in before:
        raise DataError(f"{where}: {name!r:.80} is named for the second time: put all of its labels in one line")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name!r:.80} lies outside of {folder}: name images by their path from there")
    if not (folder / name).is_file():
        raise DataError(f"{where}: there is no image {name!r:.80} in {folder}: correct its path, or remove the line")


def _folders(root: Path) -> dict[str, Path | None]:
    """The folder of each split that has a table."""
    found: dict[str, Path | None] = {}
    for split, aliases in SPLITS.items():
        folders = [root / alias for alias in aliases if (root / alias / NAME).is_file()]
        if len(folders) > 1:
            raise DataError(f"--data {root} has tables in both {folders[0].name}/ and {folders[1].name}/: leave one")
        found[split] = folders[0] if folders else None
    return found


def _samples(folder: Path, table: Table, labels: Sequence[str]) -> list[Sample]:
    check_labels(str(folder / NAME), labels, [label for own in table.values() for label in own])
    places = {composed_name(label): index for index, label in enumerate(labels)}
    samples = []
    for name, own in sorted(table.items()):
        first, *others = sorted(places[composed_name(label)] for label in own)
        samples.append(local_sample(folder / name, first, tuple(others)))
    return samples
