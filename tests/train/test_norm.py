"""Norms before the head: trained behind them, stored as a head behind the pretrained one."""

import dataclasses
from pathlib import Path

import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import BackboneError
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.methods.heads import HeadNorm
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.methods.start import start_from_data
from gpt_serve.train.recipes.recipe import make_recipe
from tests import reference
from tests.tiny_vit import PREPROCESS, random_images, tiny_backbone
from tests.train.conftest import Recorder

RECIPE = make_recipe("paper", prompts=3, gate_init=1.0, epochs=6, warmup=1, lr=0.05, batch_size=8, norm="fresh")
RECIPES = {norm: dataclasses.replace(RECIPE, norm=norm) for norm in ("fresh", "standard")}


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


@pytest.mark.parametrize("norm", RECIPES)
def test_what_is_stored_answers_alike(shifted: Backbone, colours: Path, tmp_path: Path, norm: str) -> None:
    summary = train_adapter(shifted, TrainingJob("colours", str(colours), tmp_path, RECIPES[norm]), Recorder(), World())
    assert summary is not None and summary["recipe"]["norm"] == norm
    samples = open_dataset(str(colours), 0).test
    answers = Engine(shifted, AdapterStore(tmp_path)).predict([("colours", sample.read()) for sample in samples])
    right = [
        isinstance(answer, Prediction) and answer.labels.index(answer.top(1)[0][0]) == sample.target
        for answer, sample in zip(answers, samples, strict=True)
    ]
    assert sum(right) / len(right) == summary["metrics"]["test_accuracy"] >= 0.75


@pytest.mark.parametrize("norm", RECIPES)
def test_folded_head_is_exact(shifted: Backbone, norm: str) -> None:
    module = build_module(shifted, RECIPES[norm], 4).eval()
    assert isinstance(module, AdapterModule) and module.head_norm is not None
    if norm == "standard":
        module.head_norm.set_standard([3 + 5 * torch.randn(50, 24) * torch.rand(24)])
    stored = module.stored()
    assert not torch.allclose(stored["head_weight"], module.head.weight)
    images = random_images(3)
    expected = module(shifted.model, images)
    module.head_norm = None
    with torch.no_grad():
        module.head.weight.copy_(stored["head_weight"])
        module.head.bias.copy_(stored["head_bias"])
    torch.testing.assert_close(module(shifted.model, images), expected, atol=1e-5, rtol=1e-5)


def test_standard_features_are_those_of_the_training_images(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """With the prompts that training starts from, and of images that are not augmented."""
    recipe = dataclasses.replace(RECIPES["standard"], prompt_init="tokens")
    module = build_module(tiny, recipe, 3)
    assert isinstance(module, AdapterModule) and module.head_norm is not None
    view = View(open_dataset(str(colours), 0).train, PREPROCESS, None, "crop-flip", 0)
    job = TrainingJob("colours", str(colours), tmp_path, recipe, workers=0)
    start_from_data(tiny, module, job, view, Inputs(0), Recorder())
    plain = View(view.samples, PREPROCESS, None, "none", 0)
    mean, std = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
    images = normalize(torch.stack([plain[index][0] for index in range(len(plain))]), mean, std)
    scaler = StandardScaler().fit(module.features(tiny.model, images).detach().double().numpy())
    torch.testing.assert_close(module.head_norm.shift, torch.from_numpy(scaler.mean_).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        module.head_norm.scale, torch.from_numpy(1 / scaler.scale_).float(), atol=1e-4, rtol=1e-3
    )


def test_a_feature_that_never_varies_stays_finite() -> None:
    norm = HeadNorm(2)
    norm.set_standard([torch.tensor([[1.0, 2.0], [1.0, 4.0]])])
    assert norm(torch.tensor([[1.0, 3.0]])).tolist() == [[0.0, 0.0]] and norm.scale.isfinite().all()


@pytest.mark.slow
def test_resuming_keeps_what_training_started_from(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """What is standard, and the head."""
    recipe = dataclasses.replace(RECIPES["standard"], head_init="lda")
    train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path / "whole", recipe), Recorder(), World())
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path / "parts", recipe), Recorder(3), World())
    train_adapter(
        tiny, TrainingJob("colours", str(colours), tmp_path / "parts", recipe, resume=True), Recorder(), World()
    )
    one, other = (AdapterStore(tmp_path / name).load("colours").adapter for name in ("whole", "parts"))
    assert torch.equal(one.head_weight, other.head_weight) and torch.equal(one.head_bias, other.head_bias)


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
