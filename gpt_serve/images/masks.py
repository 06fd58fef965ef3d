"""From logits to a mask, for serving, evaluation and exported graphs. Needs numpy alone: graphs are run without torch.

No border of an image is lost. It is scaled to a whole number of patches and covered by inputs of the backbone, its
windows: a single one (``squash``, ``pad``), or several that overlap by a third (``windows``). Windows begin at whole
patches, so that their logits meet cell by cell: `stitched` averages them where they overlap, and `mask` scales the
result to the image (bilinear, align_corners off) and takes the largest.

Shapes: image ``h, w`` pixels as posted, after EXIF; grid of an input ``gh, gw`` patches; scaled image ``R, K`` patches;
windows ``W``; classes ``C``; logits of a window ``(C, s*gh, s*gw)`` with ``s`` cells for each patch.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_WINDOWS = 64
"""An image that would take more is scaled further down, so that what a request costs has a bound."""
STEP = 2 / 3  # from one window to the next, as a share of its side; SETR's is 341 of 512 pixels
_BAND = 2**22  # values that `mask` holds at a time

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tiling:
    """How one image is covered by inputs.

    Attributes:
        size: (h, w).
        grid: (gh, gw).
        patches: (R, K), of the scaled image; less than the grid where an input is filled up.
        windows: top and left patch of each window.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    patches: tuple[int, int]
    windows: tuple[tuple[int, int], ...]

    @property
    def cells(self) -> int:
        """Patches of all windows together."""
        return len(self.windows) * self.grid[0] * self.grid[1]


def tiling(size: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int], mode: str, crop_pct: float) -> Tiling:
    """Plan the windows of an image.

    Args:
        size: (h, w) of the image in pixels.
        grid: (gh, gw) patches of an input.
        patch: (height, width) of a patch in pixels.
        mode: ``squash``, ``pad`` or ``windows``.
        crop_pct: with ``windows`` the share of the scaled image's shorter side that a window covers.
    """
    if mode == "squash":
        return Tiling(size, grid, grid, ((0, 0),))
    sides = [size[axis] / (grid[axis] * patch[axis]) for axis in (0, 1)]  # in inputs
    inputs = 1 / max(sides) if mode == "pad" else 1 / (crop_pct * min(sides))
    most = MOST_WINDOWS if mode == "windows" else 1
    while True:
        patches = [max(1, round(grid[axis] * sides[axis] * inputs)) for axis in (0, 1)]
        if math.prod(map(_count, patches, grid)) <= most:
            break
        inputs *= 0.97
    rows, columns = map(_starts, patches, grid)
    return Tiling(size, grid, (patches[0], patches[1]), tuple((y, x) for y in rows for x in columns))


def _step(side: int) -> int:
    """Patches from one window of ``side`` to the next."""
    return max(1, math.floor(side * STEP))


def _count(patches: int, side: int) -> int:
    """How many windows `_starts` places; an image may be so long that they could not all be listed."""
    return 1 + math.ceil(max(0, patches - side) / _step(side))


def _starts(patches: int, side: int) -> list[int]:
    """Where windows begin along one side; the last one is shifted back inside."""
    last = max(0, patches - side)
    return [*range(0, last, _step(side)), last]


def stitched(plan: Tiling, logits: Floats) -> Floats:
    """Average the logits of overlapping windows: (W, C, s*gh, s*gw) to (C, s*R, s*K)."""
    scale = logits.shape[2] // plan.grid[0]
    rows, columns = (scale * side for side in plan.patches)
    if len(plan.windows) == 1:
        return np.ascontiguousarray(logits[0, :, :rows, :columns])
    total = np.zeros((logits.shape[1], rows, columns), np.float32)
    count = np.zeros((rows, columns), np.float32)
    for window, (top, left) in zip(logits, plan.windows, strict=True):
        y, x = scale * top, scale * left
        own = window[:, : rows - y, : columns - x]
        total[:, y : y + own.shape[1], x : x + own.shape[2]] += own
        count[y : y + own.shape[1], x : x + own.shape[2]] += 1
    total /= count
    return total


def mask(logits: Floats, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The most probable class of each pixel: logits (C, y, x), scaled bilinearly to ``size``, to ids (h, w).

    Of equal logits the lower id counts. The scaled logits are never held whole: they may take gigabytes.
    """
    height, width = size
    across = _weights(logits.shape[2], width)
    first, second, share = _taps(logits.shape[1], height)
    ids = np.empty(size, np.uint8)
    step = max(1, _BAND // (width * logits.shape[0]))
    for top in range(0, height, step):
        rows = slice(top, top + step)
        below = share[rows, None]
        band = logits[:, first[rows]] * (1 - below) + logits[:, second[rows]] * below
        ids[rows] = _largest(band @ across)
    return ids


def _largest(scores: Floats) -> NDArray[np.uint8]:
    """The index of the largest of (C, y, x) along the first axis, several times as fast as numpy's own."""
    best, ids = scores[0].copy(), np.zeros(scores.shape[1:], np.uint8)
    for number in range(1, len(scores)):
        better = scores[number] > best
        np.copyto(ids, number, where=better)
        np.maximum(best, scores[number], out=best)
    return ids


def _taps(cells: int, pixels: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """For each of ``pixels`` the two cells that it lies between, and the second one's share (align_corners off)."""
    place = ((np.arange(pixels) + 0.5) * (cells / pixels) - 0.5).clip(0, cells - 1)
    first = np.floor(place).astype(np.intp)
    return first, np.minimum(first + 1, cells - 1), (place - first).astype(np.float32)


def _weights(cells: int, pixels: int) -> Floats:
    """`_taps` as a matrix (cells, pixels)."""
    first, second, share = _taps(cells, pixels)
    weights = np.zeros((cells, pixels), np.float32)
    np.add.at(weights, (first, np.arange(pixels)), 1 - share)
    np.add.at(weights, (second, np.arange(pixels)), share)
    return weights


def shares(ids: NDArray[np.uint8], classes: int) -> Floats:
    """The share of the pixels of a mask (h, w) that each of ``classes`` has, (C,), adding up to 1."""
    return (np.bincount(ids.ravel(), minlength=classes) / ids.size).astype(np.float32)
