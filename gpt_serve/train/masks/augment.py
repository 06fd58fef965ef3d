"""Joint augmentation of a picture and the ids of its pixels, by torchvision's ``tv_tensors``.

As SETR and most others train: a scale of 0.5 to 2, a crop in which no class has more than 75 %, a mirror image half of
the time, and brightness, contrast, saturation and hue that vary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from gpt_serve.images.masks import Tiling
from gpt_serve.specs import Preprocess
from gpt_serve.train.masks.samples import NOTHING, Ids

# torchvision's types know none of these names.
transforms: Any = functional
typed: Any = tv_tensors

SCALES = (0.5, 2.0)
MOST_OF_ONE_CLASS = 0.75
TRIES = 10
BRIGHTNESS, HUE = 0.125, 0.05  # 32 of 255 levels, 18 of 360 degrees
CONTRAST = (0.5, 1.5)  # and saturation


@dataclass(frozen=True)
class Crop:
    """A part of a picture, uint8 (3, H, W), and the ids of its pixels, uint8 (H, W)."""

    image: Tensor
    ids: Tensor


def random_crop(image: Tensor, ids: Ids, plan: Tiling, preprocess: Preprocess, rng: np.random.Generator) -> Crop:
    """Scale a picture at random, as against its scale in ``plan``, and cut an input out of it.

    Where the scaled picture is smaller than the input, the rest is black and of no class.
    """
    height, width = preprocess.input_size
    patch = (height // plan.grid[0], width // plan.grid[1])
    factor = rng.uniform(*SCALES)
    size = [max(1, round(plan.patches[axis] * patch[axis] * factor)) for axis in (0, 1)]
    window = _window(ids, size, (height, width), rng)
    picture, mask = typed.Image(image), typed.Mask(torch.from_numpy(ids))
    mode = InterpolationMode(preprocess.interpolation)
    # Cut first and scale then: a few per mille of the pixels differ at the rim, and large pictures take a fraction.
    top, left, rows, columns = window.source
    cut = [transforms.crop(item, top, left, rows, columns) for item in (picture, mask)]
    scaled = [transforms.resize(item, list(window.scaled), mode, antialias=True) for item in cut]
    missing = [0, 0, width - window.scaled[1], height - window.scaled[0]]
    return Crop(
        _varied(transforms.pad(scaled[0], missing), rng).as_subclass(Tensor).contiguous(),
        transforms.pad(scaled[1], missing, fill=NOTHING).as_subclass(Tensor).contiguous(),
    )


@dataclass(frozen=True)
class _Window:
    """Top, left, height and width of what is cut out of the picture, and the size that it is scaled to."""

    source: tuple[int, int, int, int]
    scaled: tuple[int, int]


def _window(ids: Ids, size: list[int], wanted: tuple[int, int], rng: np.random.Generator) -> _Window:
    """A window of a picture that is scaled to ``size``: the first of a few in which no class is nearly alone."""
    scaled = (min(size[0], wanted[0]), min(size[1], wanted[1]))
    ratio = [ids.shape[axis] / size[axis] for axis in (0, 1)]
    lengths = [max(1, round(scaled[axis] * ratio[axis])) for axis in (0, 1)]
    for _ in range(TRIES):
        top, left = (int(rng.integers(0, ids.shape[axis] - lengths[axis] + 1)) for axis in (0, 1))
        counts = np.bincount(ids[top : top + lengths[0], left : left + lengths[1]].ravel(), minlength=256)[:NOTHING]
        if counts.max() <= MOST_OF_ONE_CLASS * max(1, counts.sum()):
            break
    return _Window((top, left, lengths[0], lengths[1]), scaled)


def _varied(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each half of the time."""
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda image: transforms.adjust_brightness(image, 1 + rng.uniform(-BRIGHTNESS, BRIGHTNESS)),
        lambda image: transforms.adjust_contrast(image, rng.uniform(*CONTRAST)),
        lambda image: transforms.adjust_saturation(image, rng.uniform(*CONTRAST)),
        lambda image: transforms.adjust_hue(image, rng.uniform(-HUE, HUE)),
    )
    for change in changes:
        if rng.random() < 0.5:
            picture = change(picture)
    return picture


def flipped(crop: Crop) -> Crop:
    """The mirror image."""
    return Crop(crop.image.flip(2), crop.ids.flip(1))


def window_ids(ids: Ids, plan: Tiling, preprocess: Preprocess) -> Tensor:
    """The ids (H, W) of the first window of ``plan``, each that of the nearest pixel; outside of the picture none."""
    height, width = preprocess.input_size
    patch = (height // plan.grid[0], width // plan.grid[1])
    size = [plan.patches[axis] * patch[axis] for axis in (0, 1)]
    scaled = transforms.resize_mask(torch.from_numpy(ids)[None], size)
    top, left = plan.windows[0]
    own = scaled[:, top * patch[0] :, left * patch[1] :][:, :height, :width]
    filled: Tensor = transforms.pad_mask(own, [0, 0, width - own.shape[2], height - own.shape[1]], fill=NOTHING)[0]
    return filled.contiguous()
