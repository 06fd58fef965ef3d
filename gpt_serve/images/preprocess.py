"""The one preprocessing, for training, serving and export: from a decoded image to what the backbone takes.

    decode -> uint8 (3, h, w) RGB -> preprocess_image -> uint8 (3, H, W) -> batch -> normalize -> float32 (B, 3, H, W)

Scaling follows timm's evaluation transform, but runs on the uint8 tensor, where it is five to eight times as fast as
Pillow. The two round differently: about 1 value in 250 differs by one level of 255, 1 in 100,000 by two.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from gpt_serve.images.masks import Tiling, tiling
from gpt_serve.specs import Preprocess

# Scaling the shorter side of a 1 x 50,000 image up to 256 would make 12.8 million columns, of which the centre crop
# keeps 256. The ends of a side that would become longer than this many times what it must cover are cut off first.
_MAX_STRETCH = 50


def preprocess_image(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Scale and crop an image to the backbone's input size.

    Args:
        image: uint8 (3, h, w).
        preprocess: how.

    Returns:
        uint8 (3, H, W), contiguous.
    """
    return center_crop(resize(image, preprocess), preprocess).contiguous()


def plan_windows(image: Tensor, preprocess: Preprocess, grid: tuple[int, int]) -> Tiling:
    """Say how the image (3, h, w) of a segmentation task is covered by inputs of ``grid`` patches each."""
    height, width = preprocess.input_size
    patch = (height // grid[0], width // grid[1])
    return tiling((image.shape[1], image.shape[2]), grid, patch, preprocess.crop_mode, preprocess.crop_pct)


def cut_windows(image: Tensor, preprocess: Preprocess, plan: Tiling) -> tuple[Tensor, ...]:
    """Scale an image, antialiased, and cut the inputs of ``plan`` out of it; what lies outside of it is black.

    Args:
        image: uint8 (3, h, w).
        preprocess: gives the input size and the interpolation.
        plan: from `plan_windows`.

    Returns:
        uint8 (3, H, W) for each window, contiguous.
    """
    height, width = preprocess.input_size
    patch = (height // plan.grid[0], width // plan.grid[1])
    scaled = _resized(image, (plan.patches[0] * patch[0], plan.patches[1] * patch[1]), preprocess)
    missing = [max(0, side - have) for side, have in zip((height, width), scaled.shape[1:], strict=True)]
    if any(missing):
        scaled = pad(scaled, (0, missing[1], 0, missing[0]))
    corners = [(top * patch[0], left * patch[1]) for top, left in plan.windows]
    return tuple(scaled[:, top : top + height, left : left + width].contiguous() for top, left in corners)


def resize(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Scale an image as timm's evaluation transform does, antialiased.

    ``center`` keeps the aspect ratio and covers ``floor(input_size / crop_pct)``; ``squash`` scales
    both sides to ``input_size``. If ``center`` would make a side longer than 50 times what it covers,
    the ends of that side are cut off first, far outside the later crop, which may move by a pixel.

    Args:
        image: uint8 (3, h, w).
        preprocess: gives the sizes and the interpolation.

    Returns:
        uint8 (3, h', w').
    """
    size = preprocess.input_size
    if preprocess.crop_mode == "center":
        cover = (math.floor(size[0] / preprocess.crop_pct), math.floor(size[1] / preprocess.crop_pct))
        image = _cut_ends(image, cover)
        size = _covering_size((image.shape[1], image.shape[2]), cover)
    return _resized(image, size, preprocess)


def _resized(image: Tensor, size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    mode = InterpolationMode(preprocess.interpolation)
    scaled: Tensor = transforms.resize(image, list(size), mode, antialias=True)  # type: ignore[attr-defined]
    return scaled


def center_crop(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Cut the centre out of a scaled image.

    Args:
        image: uint8 (3, h', w'); a side shorter than the input's is padded with black.
        preprocess: gives the input size.

    Returns:
        uint8 (3, H, W), a view where nothing is padded.
    """
    return _crop(image, preprocess.input_size)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images: ``(images / 255 - mean) / std``.

    Args:
        images: uint8 (B, 3, H, W), on any device.
        mean: (3,) for all rows or (B, 3) for each, on the same device.
        std: like ``mean``.

    Returns:
        float32 (B, 3, H, W).
    """
    scaled = images.to(torch.float32) / 255
    return (scaled - mean.to(torch.float32).view(-1, 3, 1, 1)) / std.to(torch.float32).view(-1, 3, 1, 1)


def _cut_ends(image: Tensor, cover: tuple[int, int]) -> Tensor:
    """Shorten a side that scaling would make longer than ``_MAX_STRETCH`` times what it has to cover."""
    ratio = min(image.shape[1] / cover[0], image.shape[2] / cover[1])

    def keep(side: int, cover: int) -> int:
        longest = math.ceil(cover * ratio * _MAX_STRETCH)
        # An even number of pixels goes, so that the centre stays where it is.
        return side if side <= longest else longest + (side - longest) % 2

    return _crop(image, (keep(image.shape[1], cover[0]), keep(image.shape[2], cover[1])))


def _crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    cropped: Tensor = transforms.center_crop(image, list(size))  # type: ignore[attr-defined]
    return cropped


def _covering_size(image: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """The size (h', w') with the aspect ratio of ``image`` that just covers ``cover``, rounded as timm does."""
    height, width = image
    if cover[0] != cover[1]:
        ratio = min(height / cover[0], width / cover[1])
        return round(height / ratio), round(width / ratio)
    if height <= width:
        return cover[0], int(cover[0] * width / height)
    return int(cover[0] * height / width), cover[0]
