"""Folding changes numbers in the weights and none in the answers."""

from dataclasses import replace

import pytest
import torch

from gpt_serve.export.fold import fold_backbone, fold_pixels, fold_temperatures
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import embed, prompted_features
from gpt_serve.specs import Preprocess
from tests.tiny_vit import KINDS, random_images, random_tensors, tiny_backbone, tiny_kind

VITS = {
    "plain": {},
    "layer-scale": {"init_values": 0.5},
    "dinov2": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.5},
    "registers": {"reg_tokens": 3},
    "no-cls": {"class_token": False, "global_pool": "avg"},
    "clip": {"pre_norm": True},
    "no-bias": {"qkv_bias": False},
    "qk-norm": {"qk_norm": True},
    "scale-norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
}
PREPROCESS = Preprocess((16, 16), 1.0, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(params=VITS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return tiny_backbone(**VITS[request.param])


@pytest.mark.parametrize("name", KINDS)
def test_folded_kind_equals_its_original(name: str) -> None:
    """Keys that are rotated keep their bias: it no longer adds the same to all scores of a query."""
    kind, images = tiny_kind(name), random_images(2)
    folded = fold_backbone(kind.model)
    adapter = AdapterBatch.single(depth=3, width=24, pool=kind.spec.pool, **random_tensors("gated", 3, 24))
    expected = prompted_features(kind.model, embed(kind.model, images), adapter)
    actual = prompted_features(folded, embed(folded, images), adapter)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_folded_backbone_equals_its_original(backbone: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    folded = fold_backbone(backbone.model)
    tensors = random_tensors("gated", 3, 24)
    adapter = AdapterBatch.single(depth=3, width=24, pool="mean", **tensors)
    images = random_images(2)
    expected = prompted_features(backbone.model, embed(backbone.model, images), adapter)
    torch.testing.assert_close(
        prompted_features(folded, embed(folded, images), adapter), expected, rtol=1e-5, atol=1e-5
    )
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the resident backbone was changed"


def test_layer_scale_is_gone() -> None:
    folded = fold_backbone(tiny_backbone(init_values=0.5).model)
    assert not any("ls1" in name or "ls2" in name for name in folded.state_dict())


@pytest.mark.parametrize("name", ["plain", "no-bias", "qk-norm"])
def test_temperatures_move_into_the_queries(name: str) -> None:
    """Out of range ones are clamped first."""
    backbone = tiny_backbone(**VITS[name])
    tau = torch.tensor([0.3, 50.0, 0.0001])
    adapter = AdapterBatch.single(
        depth=3, width=24, pool="cls", tau=tau, prompt=random_tensors("gated", 3, 24)["prompt"]
    )
    tokens = embed(backbone.model, random_images(2))
    folded = fold_backbone(backbone.model).double()
    fold_temperatures(folded, tau)
    actual = prompted_features(folded, tokens.double(), replace(adapter, tau=None))
    expected = prompted_features(backbone.model.double(), tokens.double(), adapter)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("centre", [0.0, 127.5])
def test_the_patch_embedding_takes_pixels(backbone: Backbone, centre: float) -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = torch.tensor([PREPROCESS.mean]), torch.tensor([PREPROCESS.std])
    expected = embed(backbone.model, normalize(pixels, mean, std))
    folded = fold_backbone(backbone.model)
    fold_pixels(folded, PREPROCESS, centre)
    torch.testing.assert_close(embed(folded, pixels.float() - centre), expected, rtol=1e-5, atol=1e-5)


def test_centred_pixels_keep_their_digits_in_float16(bundled: Backbone) -> None:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocess = bundled.spec.preprocess
    expected = embed(bundled.model, normalize(pixels, torch.tensor([preprocess.mean]), torch.tensor([preprocess.std])))
    errors = {}
    for centre in (0.0, 127.5):
        folded = fold_backbone(bundled.model)
        fold_pixels(folded, preprocess, centre)
        tokens = embed(folded.half(), (pixels.float() - centre).half())
        errors[centre] = (tokens.float() - expected).abs().mean()
    assert errors[127.5] < 0.8 * errors[0.0]
