"""mIoU against a plain loop over pixels, exactly, and against torchmetrics."""

import numpy as np
import pytest
import torch

from gpt_serve.train.masks.samples import NOTHING
from gpt_serve.train.masks.score import Confusion


def pictures(count: int = 3, classes: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks and true ids of different sizes; the last class is in neither, and some pixels have no class."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        shape = (7 + index, 9)
        ids = rng.integers(0, classes - 1, shape).astype(np.uint8)
        mask = np.where(rng.random(shape) < 0.6, ids, rng.integers(0, classes - 1, shape)).astype(np.uint8)
        ids[rng.random(shape) < 0.2] = NOTHING
        made.append((mask, ids))
    return made


def counted(classes: int = 5) -> Confusion:
    confusion = Confusion(classes)
    for mask, ids in pictures():
        confusion.add(mask, ids)
    return confusion


def test_miou_equals_a_loop_over_pixels() -> None:
    ious = []
    for number in range(5):
        both = either = 0
        for mask, ids in pictures():
            for given, true in zip(mask.ravel().tolist(), ids.ravel().tolist(), strict=True):
                if true != NOTHING:
                    both += given == number and true == number
                    either += given == number or true == number
        if either:
            ious.append(both / either)
    assert len(ious) == 4
    assert counted().miou == sum(ious) / len(ious)
    assert np.array_equal(counted().iou[:4], ious) and np.isnan(counted().iou[4])


def test_miou_equals_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    metric = classification.MulticlassJaccardIndex(num_classes=5, ignore_index=NOTHING)
    for mask, ids in pictures():
        metric.update(torch.from_numpy(mask.astype(int)), torch.from_numpy(ids.astype(int)))
    assert counted().miou == pytest.approx(metric.compute().item(), abs=1e-6)


def test_accuracy_counts_pixels_with_a_class() -> None:
    right = total = 0
    for mask, ids in pictures():
        right += int(((mask == ids) & (ids != NOTHING)).sum())
        total += int((ids != NOTHING).sum())
    assert counted().accuracy == right / total


def test_of_nothing_there_is_no_miou() -> None:
    empty = Confusion(3)
    empty.add(np.zeros((2, 2), np.uint8), np.full((2, 2), NOTHING, np.uint8))
    assert np.isnan(empty.miou) and empty.by_class(("a", "b", "c")) == {"a": None, "b": None, "c": None}
