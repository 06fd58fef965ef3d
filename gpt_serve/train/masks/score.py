"""How good masks are: intersections and unions summed over a whole split, as the field reports them.

``iou[c] = pixels that are c and are called c / pixels that are c or are called c``, over all pictures together; mIoU is
the mean over the classes that occur. Pixels of no class count for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpt_serve.train.masks.samples import NOTHING, Ids


@dataclass
class Confusion:
    """Counts of pixels by true class (rows) and by the class that they are given (columns), (C, C)."""

    classes: int
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.classes, self.classes), np.int64)

    def add(self, mask: Ids, ids: Ids) -> None:
        """Count the pixels of one picture: what they are given, and what they are, (h, w) each."""
        known = ids != NOTHING
        pairs = ids[known].astype(np.int64) * self.classes + mask[known]
        self.counts += np.bincount(pairs, minlength=self.classes**2).reshape(self.counts.shape)

    @property
    def iou(self) -> NDArray[np.float64]:
        """Of each class, (C,); NaN for one that neither occurs nor is given."""
        hit = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hit
        return np.where(union > 0, hit / np.maximum(union, 1), np.nan)

    @property
    def miou(self) -> float:
        """The mean of `iou` over the classes that occur; NaN without any pixel."""
        found = self.iou[~np.isnan(self.iou)]
        return float(found.mean()) if len(found) else float("nan")

    @property
    def accuracy(self) -> float:
        """The share of the pixels that are given their class."""
        return float(self.counts.diagonal().sum() / max(1, self.counts.sum()))

    def by_class(self, labels: Sequence[str]) -> dict[str, float | None]:
        """`iou` by name; None for a class that does not occur."""
        return {label: None if np.isnan(value) else float(value) for label, value in zip(labels, self.iou, strict=True)}
