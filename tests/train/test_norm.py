"""A fresh norm before the head: trained behind it, stored as a head behind the pretrained one."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt_serve.backbone import Backbone
from gpt_serve.engine import Engine, Prediction
from gpt_serve.errors import BackboneError
from gpt_serve.store import AdapterStore
from gpt_serve.train.data import open_dataset
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import Job, build_module, train_adapter
from gpt_serve.train.methods import AdapterModule
from gpt_serve.train.recipe import make_recipe
from tests import reference
from tests.tiny_vit import random_images, tiny_backbone
from tests.train.conftest import Recorder

RECIPE = make_recipe("paper", prompts=3, gate_init=1.0, epochs=6, warmup=1, lr=0.05, batch_size=8, norm="fresh")


@pytest.fixture(scope="module")
def shifted() -> Backbone:
    """Its final norm is far from a new one."""
    backbone = tiny_backbone()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        backbone.model.norm.weight.copy_(0.5 + torch.rand(24, generator=generator))
        backbone.model.norm.bias.copy_(torch.randn(24, generator=generator))
    return backbone


@pytest.mark.parametrize("norm", ["pretrained", "fresh"])
def test_logits_are_those_of_that_norm(shifted: Backbone, norm: str) -> None:
    """The plain reference's pooled rows, through that norm, by hand."""
    module = build_module(shifted, make_recipe("paper", prompts=3, norm=norm), 4).eval()
    assert isinstance(module, AdapterModule)
    images = random_images(3)
    logits = module(shifted.model, images)
    for image, actual in zip(images, logits, strict=True):
        result = reference.forward(
            shifted.model,
            image,
            pool="mean",
            head_weight=torch.zeros(1, 24),
            head_bias=torch.zeros(1),
            prompt=module.prompt,
            gamma=module.gamma,
            tau=module.tau,
        )
        pooled = torch.cat([result.blocks[-1].prompts, result.blocks[-1].patches]).mean(0)
        weight, bias = (None, None) if norm == "fresh" else (shifted.model.norm.weight, shifted.model.norm.bias)
        expected = module.head(F.layer_norm(pooled, (24,), weight, bias, shifted.model.norm.eps))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_what_is_stored_answers_alike(shifted: Backbone, colours: Path, tmp_path: Path) -> None:
    summary = train_adapter(shifted, Job("colours", str(colours), tmp_path, RECIPE), Recorder(), World())
    assert summary is not None and summary["recipe"]["norm"] == "fresh"
    samples = open_dataset(str(colours), 0).test
    answers = Engine(shifted, AdapterStore(tmp_path)).predict([("colours", sample.read()) for sample in samples])
    right = [
        isinstance(answer, Prediction) and answer.labels.index(answer.top(1)[0][0]) == sample.target
        for answer, sample in zip(answers, samples, strict=True)
    ]
    assert sum(right) / len(right) == summary["metrics"]["test_accuracy"] >= 0.75


def test_folded_head_is_exact(shifted: Backbone) -> None:
    module = build_module(shifted, RECIPE, 4).eval()
    assert isinstance(module, AdapterModule)
    stored = module.stored()
    assert not torch.allclose(stored["head_weight"], module.head.weight)
    images = random_images(3)
    expected = module(shifted.model, images)
    module.fresh_norm = None
    with torch.no_grad():
        module.head.weight.copy_(stored["head_weight"])
        module.head.bias.copy_(stored["head_bias"])
    torch.testing.assert_close(module(shifted.model, images), expected, atol=1e-5, rtol=1e-5)


def test_backbones_without_such_a_norm() -> None:
    zero = tiny_backbone()
    with torch.no_grad():
        zero.model.norm.weight[3] = 0
    with pytest.raises(BackboneError, match="weights of 0"):
        build_module(zero, RECIPE, 4)
    bare = tiny_backbone()
    bare.model.norm = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(BackboneError, match="no final LayerNorm"):
        build_module(bare, RECIPE, 4)
