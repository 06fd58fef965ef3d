"""mIoU of a stored segmentation adapter, measured through the engine that serves it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from gpt_serve.engine.bank import Resident
from gpt_serve.engine.engine import Engine, Row
from gpt_serve.engine.segment import Segmentation
from gpt_serve.errors import DataError, UsageError
from gpt_serve.images.decode import LOCAL_LIMITS, decode
from gpt_serve.specs import CropMode, Preprocess
from gpt_serve.train.masks.samples import Ids, MaskSample, label_ids
from gpt_serve.train.masks.scan import scan_masks
from gpt_serve.train.masks.score import Confusion
from gpt_serve.train.masks.sources import open_mask_test

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # each also of the mirror image


@dataclass(frozen=True)
class Protocol:
    """How pictures are measured.

    Attributes:
        geometry: ``squash`` for a whole picture in one input, ``windows`` for sliding ones; None for the adapter's own.
        multi_scale: average the probabilities of windows at `SCALES`, and of their mirror images.
    """

    geometry: CropMode | None = None
    multi_scale: bool = False

    def views(self, own: Preprocess) -> list[tuple[Preprocess, bool]]:
        """The ways in which each picture is covered, and whether it is mirrored first.

        A window covers the shorter side at most: no scaled picture is smaller than an input.
        """
        base = own.crop_pct if own.crop_mode == "windows" else 1.0
        if self.multi_scale:
            shares = [min(1.0, base / scale) for scale in SCALES]
            ways = [replace(own, crop_mode="windows", crop_pct=share) for share in shares]
            return [(way, mirrored) for way in ways for mirrored in (False, True)]
        if self.geometry is None:
            return [(own, False)]
        share = base if self.geometry == "windows" else 1.0
        return [(replace(own, crop_mode=self.geometry, crop_pct=share), False)]


def evaluate_masks(
    engine: Engine,
    task: str,
    source: str,
    protocol: Protocol = Protocol(),
    notice: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Compare the masks of every test picture of ``source`` with its label file.

    Args:
        notice: told, a line at a time, what ``source`` holds that is not used.

    Returns:
        ``task``, ``revision``, ``kind``, ``miou`` and ``pixel_accuracy`` in [0, 1], ``iou`` by class, None for one that
        does not occur, and ``n``.

    Raises:
        DataError: the data cannot be evaluated on, with all that is wrong with them.
        AdapterError: the adapter cannot be used.
    """
    stored = engine.bank.store.load(task)
    dataset = open_mask_test(source, stored.adapter.labels, stored.adapter.ignore)
    for line in dataset.unused:
        notice(line)
    scan_masks(dataset, dataset.test, stored.adapter.preprocess.exif, lambda: None)
    confusion = Confusion(len(dataset.labels))
    with engine.bank.holding(task) as resident:
        if resident.revision != stored.revision:
            raise UsageError(f"adapter {task!r} was replaced while it was evaluated: repeat the command")
        views = protocol.views(resident.preprocess)
        for sample in dataset.test:
            confusion.add(_mask(engine, resident, sample, views), label_ids(sample, dataset.table))
    return {
        "task": task,
        "revision": stored.revision,
        "kind": "segmentation",
        "miou": confusion.miou,
        "pixel_accuracy": confusion.accuracy,
        "iou": confusion.by_class(dataset.labels),
        "n": len(dataset.test),
    }


def _mask(engine: Engine, resident: Resident, sample: MaskSample, views: Sequence[tuple[Preprocess, bool]]) -> Ids:
    """The mask of one picture; with several views the most probable class on average."""
    image = decode(sample.read(), LOCAL_LIMITS, exif=resident.preprocess.exif)
    rows = []
    for preprocess, mirrored in views:
        row = engine.prepare(replace(resident, preprocess=preprocess), image.flip(2) if mirrored else image)
        if not isinstance(row, Row):
            raise DataError(f"cannot read {sample.name}: {row}; replace or remove it") from row
        rows.append(row)
    answers = engine.compute(rows)
    for answer in answers:
        if not isinstance(answer, Segmentation):
            assert isinstance(answer, Exception)
            raise answer
    found = [answer for answer in answers if isinstance(answer, Segmentation)]
    if len(found) == 1:
        return found[0].mask
    total = torch.zeros(len(resident.labels), *found[0].size)
    for answer, (_, mirrored) in zip(found, views, strict=True):
        logits = torch.from_numpy(np.flip(answer.logits, 2).copy() if mirrored else answer.logits)
        total += F.interpolate(logits[None], answer.size, mode="bilinear", align_corners=False)[0].softmax(0)
    return total.argmax(0).numpy().astype(np.uint8)
