"""Counts of the images of each split and class, in a few lines, so that a mistake in the data shows before training."""

from collections.abc import Mapping, Sequence

import numpy as np

from gpt_serve.train.data.samples import Split, counted, some

MOST_ROWS = 20  # classes that get a line each


def count_lines(labels: Sequence[str], splits: Mapping[str, Split]) -> list[str]:
    """Count the images of each split and class.

    Args:
        labels: the ``C`` classes.
        splits: the samples of each split by its name; empty splits are left out.

    Returns:
        The lines of a table with a row per class. If there are more than `MOST_ROWS` classes, a line per split that
        says from how many to how many images a class has.
    """
    counts = {
        name: np.bincount([target for sample in split for target in sample.targets], minlength=len(labels))
        for name, split in splits.items()
        if len(split)
    }
    if len(labels) > MOST_ROWS:
        return [f"{name}: {_range(labels, of_class)}" for name, of_class in counts.items()]
    rows = [["class", *counts]]
    rows += [[label, *(str(column[target]) for column in counts.values())] for target, label in enumerate(labels)]
    rows += [[f"all {len(labels)}", *(str(column.sum()) for column in counts.values())]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])  # numbers below each other
        for row in rows
    ]


def _range(labels: Sequence[str], counts: np.ndarray) -> str:
    """Sum up the counts (C,) of a split, as in ``2020 images, 10 (cup) to 20 (ant) of each of 101 classes``."""
    present = np.flatnonzero(counts)
    least, most = (int(present[pick(counts[present])]) for pick in (np.argmin, np.argmax))
    size = str(counts[least])
    if counts[least] < counts[most]:
        size = f"{counts[least]} ({labels[least]}) to {counts[most]} ({labels[most]})"
    missing = [labels[target] for target in np.flatnonzero(counts == 0).tolist()]
    none = f", none of {some(missing)}" if missing else ""
    return f"{counted(int(counts.sum()), 'image')}, {size} of each of {len(present)} classes{none}"
