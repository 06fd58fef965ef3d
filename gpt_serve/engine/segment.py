"""Masks out of a pass: the heads that read every patch, and the windows of an image put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gpt_serve.engine.bank import Resident
from gpt_serve.engine.slab import on_device, patch_readers
from gpt_serve.images.masks import Floats, Tiling, mask, shares, stitched
from gpt_serve.model.heads import mask_logits, read_taps
from gpt_serve.specs import Tap

DECODED_AT_ONCE = 8  # rows of a decoder: it holds 64 times as many cells as there are patches


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The answer of a segmentation task for one image.

    Attributes:
        task: the adapter's name.
        revision: the adapter file that computed it, first 12 hex digits of its SHA-256.
        labels: the ``C`` classes, whose places are the ids in the mask.
        size: (h, w) of the image as posted, after EXIF.
        logits: float32 (C, y, x) over the whole image, of its windows together: far fewer cells than pixels.
    """

    task: str
    revision: str
    labels: tuple[str, ...]
    size: tuple[int, int]
    logits: Floats

    @cached_property
    def mask(self) -> NDArray[np.uint8]:
        """The class id of each pixel, (h, w); computed by whoever asks first, so that no pass waits for it."""
        return mask(self.logits, self.size)

    @cached_property
    def shares(self) -> Floats:
        """The share of the mask's pixels that each class has, (C,), adding up to 1."""
        return shares(self.mask, len(self.labels))

    def to_dict(self) -> dict[str, Any]:
        """The answer as ``--json`` and HTTP have it, without the mask."""
        height, width = self.size
        named = enumerate(zip(self.labels, self.shares.tolist(), strict=True))
        classes = [{"id": number, "label": label, "share": share} for number, (label, share) in named]
        about = {"task": self.task, "revision": self.revision, "kind": "segmentation"}
        return about | {"width": width, "height": height, "classes": classes}


@dataclass(frozen=True, eq=False)
class Cover:
    """The inputs that cover an image, each uint8 (3, H, W), and how."""

    plan: Tiling
    images: tuple[Tensor, ...]

    def answer(self, resident: Resident, logits: Sequence[Floats]) -> Segmentation:
        """The answer that the logits of the inputs, (C, y, x) each, make together."""
        whole = stitched(self.plan, np.stack(logits))
        return Segmentation(resident.task, resident.revision, resident.labels, self.plan.size, whole)


def segment(
    tapped: Sequence[Tensor], taps: Sequence[Tap], residents: Sequence[Resident], grid: tuple[int, int]
) -> dict[int, Floats]:
    """The logits (C, y, x) of each row whose head reads every patch, by its number; rows of one adapter go together.

    Args:
        tapped: for each of ``taps`` the features that a pass made; those of patches of these rows alone.
        residents: of all rows.
        grid: patches of an input.
    """
    readers = patch_readers([resident.place for resident in residents])
    members: dict[Resident, list[int]] = {}
    for position, row in enumerate(readers):
        members.setdefault(residents[row], []).append(position)
    found: dict[int, Floats] = {}
    for resident, positions in members.items():
        place = resident.place
        most = DECODED_AT_ONCE if place.form.decodes else len(positions)
        for start in range(0, len(positions), most):
            some = positions[start : start + most]
            own = read_taps(tapped, taps, place.layout.taps, on_device(some, tapped[0].device))
            logits = mask_logits(own, place.head_tensors, grid).cpu().numpy()
            found |= zip((readers[position] for position in some), logits, strict=True)
    return found
