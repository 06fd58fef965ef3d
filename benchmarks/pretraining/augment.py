"""Augmentations of a whole batch on its device, with random numbers of its own for each image.

Images are float (B, 3, H, W) with values 0 to 255.
"""

import math

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.images.preprocess import normalize

LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def crop_flip_normalize(images: Tensor, min_area: float) -> Tensor:
    """uint8 (B, 3, H, W) to float32: what masked autoencoders see."""
    return to_input(random_resized_crop(images.float(), min_area))


def contrastive_view(images: Tensor, min_area: float, solarize: float) -> Tensor:
    """uint8 (B, 3, H, W) to float32: MoCo v3's view without blur, which 32 pixels do not bear.

    Args:
        solarize: share of the images whose bright half is inverted.
    """
    views = color_jitter(random_resized_crop(images.float(), min_area))
    inverted = (views >= 128) & _chance(views, solarize)
    return to_input(torch.where(inverted, 255 - views, views))


def to_input(images: Tensor) -> Tensor:
    """Normalised with the mean and standard deviation of ImageNet."""
    mean, std = (torch.tensor(value, device=images.device) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return normalize(images, mean, std)


def random_resized_crop(images: Tensor, min_area: float, *, flip: float = 0.5) -> Tensor:
    """A random part of each image, scaled back to the size of the whole, bicubic.

    As torchvision's ``RandomResizedCrop``, except that a part need not begin at a whole pixel: its area is uniform in
    [``min_area``, 1] of the image's, the logarithm of its aspect ratio in that of [3/4, 4/3].

    Args:
        flip: share of the images that are mirrored left to right.
    """
    count, device = len(images), images.device
    area = min_area + (1 - min_area) * torch.rand(count, device=device)
    aspect = torch.exp(math.log(4 / 3) * (2 * torch.rand(count, device=device) - 1))
    size = torch.stack([area * aspect, area / aspect], dim=1).sqrt().clamp(max=1)  # width, height
    centre = (1 - size) * (2 * torch.rand(count, 2, device=device) - 1)
    mirror = 1 - 2 * (torch.rand(count, device=device) < flip).float()
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = size[:, 0] * mirror, size[:, 1], centre
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    parts = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return parts.clamp(0, 255)


def color_jitter(images: Tensor) -> Tensor:
    """MoCo v3's: brightness and contrast by 0.4, saturation by 0.2, hue by 0.1, on four images of five; a fifth grey.

    Hue turns the chroma plane of YIQ, so that hue and saturation are one matrix.
    """
    jittered = _chance(images, 0.8)
    brightness, contrast = (_factor(images, 0.4) for _ in range(2))
    grey = _chance(images, 0.2)
    saturation = torch.where(grey, 0.0, torch.where(jittered, _factor(images, 0.2), 1.0))
    angle = 2 * math.pi * torch.where(jittered & ~grey, _factor(images, 0.1) - 1, 0.0)
    colored = turn_chroma(images, saturation.flatten(), angle.flatten())
    shaded = (colored * brightness).clamp(0, 255)
    mean = luma(shaded).mean(dim=(-2, -1), keepdim=True)
    return torch.where(jittered, mean + contrast * (shaded - mean), colored).clamp(0, 255)


def turn_chroma(images: Tensor, saturation: Tensor, angle: Tensor) -> Tensor:
    """Scale the chroma of each image by (B,) factors and turn it by (B,) radians; the luma stays."""
    to_yiq = torch.tensor(_TO_YIQ, device=images.device)
    turn = torch.zeros(len(images), 3, 3, device=images.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 2, 1] = saturation * angle.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return (matrix @ images.flatten(2)).view_as(images).clamp(0, 255)


def luma(images: Tensor) -> Tensor:
    """(B, 1, H, W)"""
    weights = torch.tensor(LUMA, device=images.device)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def _chance(images: Tensor, probability: float) -> Tensor:
    """(B, 1, 1, 1) bool"""
    return torch.rand(len(images), 1, 1, 1, device=images.device) < probability


def _factor(images: Tensor, spread: float) -> Tensor:
    """(B, 1, 1, 1), uniform in 1 +/- ``spread``"""
    return 1 + spread * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)
