"""Images that look the same and lie in two splits: what is measured on one of them is no surprise.

Each image is known by a thumbnail of `SIDE` x `SIDE` pixels, less its mean and brought to length 1. Two are near-
duplicates where the product of these is at least `ALIKE`: compression, a border or another scale change it by less, and
it takes no notice of brightness and contrast.

Shapes: images ``n``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.train.data.samples import Split, counted, short_name

SIDE = 12
ALIKE = 0.995
PLAIN = 2.0  # standard deviation up to which a thumbnail, in 0..255, shows nothing to be known by
ROWS = 1024  # of a split that are compared at a time
SHOWN = 5  # pairs in a warning


@dataclass(frozen=True)
class Pair:
    """Two images, by their names, that look the same."""

    first: str
    second: str


def thumbnail(image: Tensor) -> Tensor:
    """uint8 (3, h, w) to what it is known by, uint8 (3 * SIDE * SIDE,)."""
    small = F.interpolate(image[None].float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).flatten()


def near_duplicates(splits: Mapping[str, tuple[Split, Tensor]]) -> list[Pair]:
    """Pairs of images of different splits, each image of the second split once.

    Args:
        splits: of each split its samples and their thumbnails, uint8 (n, 3 * SIDE * SIDE).
    """
    known = {name: (split, _directions(thumbnails)) for name, (split, thumbnails) in splits.items() if len(split)}
    pairs = []
    for (one, own), (other, theirs) in combinations(known.values(), 2):
        for start in range(0, len(theirs), ROWS):
            likeness, index = (theirs[start : start + ROWS] @ own.T).max(dim=1)
            for row in (likeness >= ALIKE).nonzero()[:, 0].tolist():
                pairs.append(Pair(short_name(one[int(index[row])].name), short_name(other[start + row].name)))
    return pairs


def _directions(thumbnails: Tensor) -> Tensor:
    """(n, 3 * SIDE * SIDE) of length 1, or 0 where an image is all of one colour."""
    rows = thumbnails.float()
    rows = rows - rows.mean(dim=1, keepdim=True)
    rows[rows.std(dim=1) <= PLAIN] = 0
    return F.normalize(rows, dim=1)


def duplicate_line(pairs: Sequence[Pair]) -> str:
    """A warning of one line about ``pairs``, at least one."""
    shown = ", ".join(f"{pair.first} and {pair.second}" for pair in pairs[:SHOWN])
    more = f" and {len(pairs) - SHOWN} more, in the card" if len(pairs) > SHOWN else ""
    return f"{counted(len(pairs), 'pair')} of images of two splits look the same: {shown}{more}"
