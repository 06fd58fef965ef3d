"""Pictures with label files, as every source of segmentation data hands them over.

A label file is an indexed or grey PNG of its picture's size: the value of a pixel stands for its class, or for none.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from gpt_serve.errors import DataError, ImageError, UnsupportedImage
from gpt_serve.images.convert import read_image
from gpt_serve.images.decode import LOCAL_LIMITS, check_bytes, check_pixels, pillow_errors
from gpt_serve.images.headers import check_png, identify
from gpt_serve.train.data.samples import HELD_OUT, reason

NOTHING = 255
"""The id of pixels that belong to no class; values of label files that are ignored become it."""

Ids = NDArray[np.uint8]


@dataclass(frozen=True)
class MaskSample:
    """One picture and its label file.

    Attributes:
        name: what to call the picture in messages.
        read: returns the bytes of the picture, in a format that the decoder takes.
        label_name: what to call the label file in messages.
        read_labels: returns the bytes of the label file.
    """

    name: str
    read: Callable[[], bytes]
    label_name: str
    read_labels: Callable[[], bytes]


@dataclass(frozen=True)
class MaskDataset:
    """The splits of one task's pictures; splits that the source lacks are empty.

    Attributes:
        labels: names of the ``C`` classes; the place of a name is the id of its class.
        values: which class each value of a label file stands for.
        ignore: values that stand for none.
        unused: a line for each thing that the source holds and that is in no split.
    """

    labels: tuple[str, ...]
    values: Mapping[int, int]
    ignore: tuple[int, ...]
    train: Sequence[MaskSample] = ()
    val: Sequence[MaskSample] = ()
    test: Sequence[MaskSample] = ()
    unused: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def table(self) -> NDArray[np.int16]:
        """(256,) the id of each value of a label file: `NOTHING` for ignored values, -1 for unknown ones."""
        table = np.full(256, -1, np.int16)
        table[list(self.ignore)] = NOTHING
        for value, number in self.values.items():
            table[value] = number
        return table


def local_sample(picture: Path, labels: Path) -> MaskSample:
    """The sample of two files."""
    return MaskSample(str(picture), partial(read_image, picture), str(labels), labels.read_bytes)


def label_values(data: bytes) -> Ids:
    """The values of a label file, (h, w).

    Raises:
        ImageError: it is no PNG, damaged, or not of the kind that holds a class for each pixel.
    """
    check_bytes(data, LOCAL_LIMITS)
    if identify(data) != "PNG":
        raise UnsupportedImage("label files are indexed or grey PNGs, because other formats change values")
    check_png(data)
    with pillow_errors("PNG"), PngImageFile(io.BytesIO(data)) as image:
        check_pixels(image.size, LOCAL_LIMITS)
        if image.mode.startswith("I"):
            raise UnsupportedImage("it has 16 bits: save it with 8 (values from 0 to 255)")
        if image.mode not in ("P", "L", "1"):
            raise UnsupportedImage(f"it is a picture in colours ({image.mode}): save indexed or grey values")
        return np.array(image, dtype=np.uint8)


def label_ids(sample: MaskSample, table: NDArray[np.int16]) -> Ids:
    """The class id of each pixel of a sample that was checked before, (h, w).

    Raises:
        DataError: its label file cannot be read any more, or is another one.
    """
    try:
        ids = table[label_values(sample.read_labels())]
    except (ImageError, OSError) as error:
        raise DataError(f"cannot read {sample.label_name}: {reason(error)}; replace or remove it") from error
    if (ids < 0).any():
        raise DataError(f"{sample.label_name} was changed: it has values without a class; repeat the command")
    return ids.astype(np.uint8)


def hold_out(dataset: MaskDataset, seed: int) -> MaskDataset:
    """Hold a fifth of the training pictures out for validation, the same ones for the same seed.

    Raises:
        DataError: there is a single picture.
    """
    if dataset.val:
        return dataset
    count = len(dataset.train)
    if count < 2:
        raise DataError("one training picture leaves none for validation: add more pictures with label files")
    order = np.random.default_rng(seed).permutation(count).tolist()
    held = sorted(order[: max(1, round(HELD_OUT * count))])
    kept = sorted(set(range(count)) - set(held))
    train, val = ([dataset.train[index] for index in chosen] for chosen in (kept, held))
    return replace(dataset, train=train, val=val)
