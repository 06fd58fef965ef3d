"""Deep Image Prior from a block's tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from gpt_serve.errors import UsageError
from gpt_serve.insight import reconstruct as dip
from gpt_serve.insight.attention import adapter_rows, embed_pixels
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import embed, prompted_features
from tests.factories import make_adapter
from tests.tiny_vit import METHODS, PREPROCESS, random_images, tiny_backbone


def picture(side: int = 16) -> Tensor:
    """A bright disc on a colour ramp, (3, side, side) in [0, 1]."""
    ramp = torch.linspace(0, 1, side)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    disc = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06).float()
    return torch.stack([x, disc, 1 - y])


def fit(backbone: Backbone, steps: int, number: int = 1, adapter: Any = None, seed: int = 0) -> dip.Reconstruction:
    batch = adapter_rows(backbone, adapter)
    return dip.reconstruct(backbone, picture(), PREPROCESS, batch, number, steps=steps, seed=seed, on_step=lambda: None)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_that_the_blocks_hand_on(method: str, pool: Any) -> None:
    backbone = tiny_backbone(pool)
    adapter = adapter_rows(backbone, make_adapter(backbone.spec, method=method))
    tokens = embed(backbone.model, random_images(2))
    handed: list[Tensor] = []
    prompted_features(backbone.model, tokens, adapter, on_block=lambda _, x: handed.append(x))
    for number, expected in enumerate(handed, start=1):
        found = dip.tokens_after(backbone.model, tokens, adapter, number)
        assert found.shape == tokens.shape
        rows = 1 if number == 3 and pool == "cls" else tokens.shape[1]
        torch.testing.assert_close(found[:, :rows], expected[:, :rows], atol=1e-5, rtol=1e-5)


def test_without_prompts_they_are_timms() -> None:
    """Under CLS pooling too, where the served pass computes one row of the last block alone."""
    backbone = tiny_backbone("cls")
    images = random_images(2)
    adapter = adapter_rows(backbone, None)
    expected = backbone.timm_model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")[1]
    for number, (patches, prefix) in enumerate(expected, start=1):
        found = dip.tokens_after(backbone.model, embed(backbone.model, images), adapter, number)
        torch.testing.assert_close(found, torch.cat([prefix, patches], dim=1), atol=1e-5, rtol=1e-5)


def test_later_blocks_are_not_computed(tiny: Backbone) -> None:
    ran = []
    handles = [
        blk.norm1.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, blk in enumerate(tiny.model.blocks)
    ]
    dip.tokens_after(tiny.model, embed(tiny.model, random_images(1)), adapter_rows(tiny, None), 2)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


@pytest.mark.parametrize("method", [None, "gated"])
def test_fitting_brings_the_image_closer(tiny: Backbone, method: str | None) -> None:
    adapter = None if method is None else make_adapter(tiny.spec, method=method)
    start, end = fit(tiny, 1, adapter=adapter), fit(tiny, 40, adapter=adapter)
    assert end.error < 0.2 * start.error
    assert end.psnr > start.psnr + 5
    assert end.ssim > start.ssim + 0.2


def test_the_result_is_what_its_numbers_say(tiny: Backbone) -> None:
    result = fit(tiny, 20, number=2)
    original = picture()
    adapter = adapter_rows(tiny, None)
    tokens, target = (
        dip.tokens_after(tiny.model, embed_pixels(tiny, 255 * image[None], PREPROCESS), adapter, 2)
        for image in (result.image, original)
    )
    assert (tokens - target).square().mean().item() == pytest.approx(result.error, rel=1e-3)
    assert result.psnr == pytest.approx(-10 * math.log10((result.image - original).square().mean().item()), abs=1e-3)
    assert 0 <= result.image.min() <= result.image.max() <= 1


def test_the_seed_decides(tiny: Backbone) -> None:
    torch.manual_seed(1)
    one = fit(tiny, 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = fit(tiny, 5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.image, again.image)
    assert not torch.equal(one.image, fit(tiny, 5, seed=1).image)


def test_the_backbone_stays_frozen(tiny: Backbone) -> None:
    fit(tiny, 2)
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_psnr_and_ssim() -> None:
    image = picture(32)
    assert dip.quality(image, image)[1] == pytest.approx(1)
    assert dip.quality(image, 0.9 * image + 0.05)[0] > dip.quality(image, 0.5 * image + 0.25)[0]
    psnr, ssim = dip.quality(torch.zeros(3, 16, 16), torch.full((3, 16, 16), 0.1))
    assert psnr == pytest.approx(20)  # a difference of a tenth everywhere
    assert ssim < 0.1


@pytest.mark.parametrize("side", [4, 8, 15, 16, 32, 224])
def test_the_network_keeps_any_size(side: int) -> None:
    output = dip.hourglass(side)(torch.rand(1, dip.NOISE_CHANNELS, side, side + 2))
    assert output.shape == (1, 3, side, side + 2)
    assert 0 <= output.min() <= output.max() <= 1


def test_small_inputs_are_refused(tiny: Backbone) -> None:
    with pytest.raises(UsageError, match="an input of 8 pixels is too small: use --input-size 16 or more"):
        dip.reconstruct(
            tiny,
            picture(8),
            PREPROCESS,
            adapter_rows(tiny, None),
            1,
            steps=1,
            seed=0,
            on_step=lambda: None,
        )


def test_plot(tiny: Backbone, tmp_path: Path) -> None:
    found = [fit(tiny, 1, number) for number in (1, 3)]
    dip.plot_reconstructions(picture(), {"backbone": found, "alpha": found[:1]}, tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as image:
        assert image.width > image.height
