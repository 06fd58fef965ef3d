"""One look at every picture and label file before anything trains: what cannot be used is listed in one line."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gpt_serve.errors import DataError, ImageError
from gpt_serve.images.decode import LOCAL_LIMITS, decode
from gpt_serve.train.data.samples import counted, reason, some
from gpt_serve.train.masks.samples import NOTHING, Ids, MaskDataset, MaskSample, label_values


@dataclass(frozen=True)
class Scanned:
    """What the look at one sample found.

    Attributes:
        digest: SHA-256 (hex) of both files.
        size: (h, w) of the picture after EXIF.
        pixels: how many pixels of each id there are, (C,); ignored ones are not counted.
        trouble: what is wrong with it, by kind; empty when all is well.
    """

    digest: str
    size: tuple[int, int]
    pixels: np.ndarray
    trouble: dict[str, str]


def scan_masks(
    dataset: MaskDataset, samples: Sequence[MaskSample], exif: bool, on_image: Callable[[], object]
) -> list[Scanned]:
    """Read both files of every sample, in parallel and in order.

    Raises:
        DataError: some cannot be used; kinds of trouble and names of samples.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = []
        for result in threads.map(lambda sample: _look(dataset, sample, exif), samples):
            on_image()
            found.append(result)
    _refuse(samples, found)
    return found


def _refuse(samples: Sequence[MaskSample], found: Sequence[Scanned]) -> None:
    """Raise `DataError` if there is any trouble."""
    kinds: dict[str, list[str]] = {}
    for sample, result in zip(samples, found, strict=True):
        for kind, detail in result.trouble.items():
            kinds.setdefault(kind, []).append(f"{sample.label_name}{detail}")
    if kinds:
        lines = [f"{counted(len(names), 'label file')} {kind}: {some(names)}" for kind, names in kinds.items()]
        raise DataError("; ".join(lines) + "; mend them, or take them away with their pictures")


def _look(dataset: MaskDataset, sample: MaskSample, exif: bool) -> Scanned:
    nothing = np.zeros(len(dataset.labels), int)
    try:
        data, labels = sample.read(), sample.read_labels()
        image = decode(data, LOCAL_LIMITS, exif=exif)
        digest = hashlib.sha256(data + labels).hexdigest()
    except (ImageError, OSError) as error:
        return Scanned("", (0, 0), nothing, {"whose picture cannot be read": f" ({reason(error)})"})
    size = (image.shape[1], image.shape[2])
    try:
        values = label_values(labels)
    except ImageError as error:
        return Scanned(digest, size, nothing, {"that cannot be read": f" ({reason(error)})"})
    return Scanned(digest, size, *_counted(dataset, values, size))


def _counted(dataset: MaskDataset, values: Ids, size: tuple[int, int]) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels of each id, and what is wrong with values or size."""
    counts = np.bincount(values.ravel(), minlength=256)
    table = dataset.table
    pixels = np.bincount(table.clip(0), weights=counts * ((table >= 0) & (table != NOTHING)))
    pixels = np.resize(np.append(pixels, np.zeros(len(dataset.labels))), len(dataset.labels)).astype(int)
    trouble = {}
    if unknown := np.flatnonzero((counts > 0) & (table < 0)).tolist():
        named = f"{len(dataset.labels)} classes"
        trouble[f"with values that are none of the {named} (--ignore names those without one)"] = (
            f" ({some([str(value) for value in unknown])})"
        )
    if values.shape != size:
        trouble["of another size than their picture"] = (
            f" ({values.shape[1]} x {values.shape[0]}, not {size[1]} x {size[0]})"
        )
    return pixels, trouble


def count_lines(labels: Sequence[str], splits: dict[str, list[Scanned]]) -> list[str]:
    """Say what there is: pictures of each split, and the share of its pixels that each class has."""
    lines = []
    for name, found in splits.items():
        if not found:
            continue
        total = np.sum([result.pixels for result in found], axis=0)
        shares = Counter({label: count / max(1, total.sum()) for label, count in zip(labels, total, strict=True)})
        largest = [f"{label} {100 * share:.1f} %" for label, share in shares.most_common()]
        lines.append(f"{name}: {counted(len(found), 'picture')}, pixels: {some(largest)}")
    return lines


def scaled_bytes(scaled: Sequence[Tensor]) -> int:
    """Size of images in memory."""
    return sum(image.numel() for image in scaled)
