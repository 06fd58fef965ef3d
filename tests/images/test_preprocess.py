"""Scaling, cropping and normalizing, against timm and Pillow."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from gpt_serve.images.decode import from_pil
from gpt_serve.images.preprocess import center_crop, normalize, preprocess_image, resize
from gpt_serve.specs import Preprocess
from tests.hostile_images import photo

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(size=(224, 224), crop_pct=0.9, interpolation="bicubic", crop_mode="center") -> Preprocess:
    return Preprocess(size, crop_pct, crop_mode, interpolation, MEAN, STD)


def timm_transform(config: Preprocess):
    return create_transform(
        input_size=(3, *config.input_size),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode="center",
        mean=MEAN,
        std=STD,
        normalize=False,
    )


def real_images() -> list[Image.Image]:
    files = [*sorted(DATA.glob("flowers12/test/*/*.jpg"))[::40], *sorted(DATA.glob("caltech101/test/*/*.jpg"))[::60]]
    return [Image.open(file).convert("RGB") for file in files[:24]]


def generated_images() -> list[Image.Image]:
    sizes = [(1, 1), (3, 5), (224, 224), (500, 333), (333, 500), (249, 255), (31, 400), (1000, 63), (2000, 130)]
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    return [Image.fromarray(noise), *(photo(width, height) for width, height in sizes)]


CONFIGS = [
    preprocess(),
    preprocess(crop_pct=0.875, interpolation="bilinear"),
    preprocess((32, 32), crop_pct=1.0),
    preprocess((256, 256), crop_pct=0.95),
    preprocess((160, 96)),
    preprocess((96, 224), interpolation="bilinear"),
]


def check_against_timm(config: Preprocess, images: list[Image.Image]) -> None:
    """At most 2 of 255 levels apart, by more than 1 in at most 1 of 10,000 values, by any in 1 of 50."""
    reference = timm_transform(config)
    differences = []
    for image in images:
        ours, theirs = preprocess_image(from_pil(image), config), reference(image)
        assert ours.shape == theirs.shape == (3, *config.input_size)
        differences.append((ours.int() - theirs.int()).abs().flatten())
    difference = torch.cat(differences)
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 1e-4
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.input_size}-{config.interpolation}")
def test_preprocess_equals_timm_on_generated_images(config):
    check_against_timm(config, generated_images())


@pytest.mark.skipif(not (DATA / "flowers12").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.input_size}-{config.interpolation}")
def test_preprocess_equals_timm_on_real_images(config):
    check_against_timm(config, real_images())


def test_preprocess_does_not_depend_on_the_memory_layout():
    image = from_pil(photo(300, 200))
    assert not image.is_contiguous()
    result = preprocess_image(image, preprocess())
    assert result.is_contiguous()
    assert torch.equal(result, preprocess_image(image.contiguous(), preprocess()))


@pytest.mark.parametrize("size", [(300, 200), (30, 400), (7, 5)])
def test_squash_scales_both_sides(size):
    config = preprocess((64, 48), crop_mode="squash", crop_pct=0.5)
    image = photo(*size)
    expected = torch.tensor(np.array(image.resize((48, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1).int()
    assert (preprocess_image(from_pil(image), config).int() - expected).abs().max() <= 2
    assert resize(from_pil(image), config).shape == (3, 64, 48)


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (3, 40_000), (20_000, 350)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.input_size}-{config.interpolation}")
def test_extreme_aspect_ratios_stay_small(size, config):
    image = from_pil(Image.new("RGB", size, (10, 20, 30)))
    assert resize(image, config).numel() <= 3 * 51 * 300 * 300
    result = preprocess_image(image, config)
    assert result.flatten(1).amin(1).tolist() == result.flatten(1).amax(1).tolist() == [10, 20, 30]


@pytest.mark.parametrize("size", [(1001, 7), (1000, 3), (7, 1000), (3, 1001)])
def test_cutting_the_ends_keeps_the_centre(size):
    ours = preprocess_image(from_pil(photo(*size)), preprocess()).int()
    theirs = timm_transform(preprocess())(photo(*size)).int()
    assert (ours - theirs).abs().max() <= 3


def test_center_crop_takes_the_middle():
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).reshape(3, 6, 8)
    assert torch.equal(center_crop(image, preprocess((2, 4))), image[:, 2:4, 2:6])


def test_normalize_with_one_mean_and_std():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalize(images, torch.tensor(MEAN), torch.tensor(STD))
    expected = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float())


def test_normalize_rows_differ():
    images = torch.randint(0, 256, (3, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.rand(3, 3), torch.rand(3, 3) + 0.1
    rows = [normalize(images[row : row + 1], mean[row], std[row]) for row in range(3)]
    assert torch.equal(normalize(images, mean, std), torch.cat(rows))
    assert not any(torch.equal(one, other) for one, other in pairwise(rows))
