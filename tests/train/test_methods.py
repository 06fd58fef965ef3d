"""What every method learns and starts from, by numbers that the papers and their authors' code give."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import BackboneSpec
from gpt_serve.train.fit import build_module
from gpt_serve.train.methods.heads import make_head
from gpt_serve.train.methods.prompts import METHODS, AdapterModule
from gpt_serve.train.recipes.recipe import make_recipe
from tests import reference
from tests.tiny_vit import PREPROCESS, random_images

SIZES = {"base": (768, 12), "large": (1024, 24)}


def shapes_of(size: str) -> Any:
    """ViT-B/16 or ViT-L/16 without weights: only the shapes count."""
    width, depth = SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch16_224", num_classes=0)
    assert (model.embed_dim, len(model.blocks)) == (width, depth)
    spec = BackboneSpec(name=size, fingerprint="", depth=depth, width=width, pool="cls", preprocess=PREPROCESS)
    return SimpleNamespace(spec=spec, model=model)


def initial(size: str, method: str = "gated", prompts: int = 100, classes: int = 200, **settings: Any) -> AdapterModule:
    recipe = make_recipe("paper", method=method, prompts=prompts, **settings)
    module = build_module(shapes_of(size), recipe, classes)
    assert isinstance(module, AdapterModule)
    return module


PUBLISHED = {  # of ViT-B and ViT-L with P prompts and C classes
    "gated": (lambda p, c: 768 * p + 11 + 12 + 769 * c, lambda p, c: 1024 * p + 23 + 24 + 1025 * c),
    "gated-deep": (lambda p, c: 12 * 768 * p + 11 + 12 + 769 * c, lambda p, c: 24 * 1024 * p + 23 + 24 + 1025 * c),
    "vpt-shallow": (lambda p, c: 768 * p + 769 * c, lambda p, c: 1024 * p + 1025 * c),
    "vpt-deep": (lambda p, c: 12 * 768 * p + 769 * c, lambda p, c: 24 * 1024 * p + 1025 * c),
    "spt-shallow": (lambda p, c: 768 * p + 769 * c, lambda p, c: 1024 * p + 1025 * c),
    "spt-deep": (lambda p, c: 12 * 768 * p + 769 * c, lambda p, c: 24 * 1024 * p + 1025 * c),
    "linear": (lambda p, c: 769 * c, lambda p, c: 1025 * c),
    "bias": (lambda p, c: 12 * 3 * 768 + 769 * c, lambda p, c: 24 * 3 * 1024 + 1025 * c),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", PUBLISHED)
def test_parameters_of_published_backbones(method: str, size: str) -> None:
    module = initial(size, method, prompts=7, classes=30)
    expected = PUBLISHED[method][list(SIZES).index(size)](7, 30)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected
    plain = {name for name in METHODS if not name.endswith("+shift")}
    assert {*PUBLISHED, "full"} == plain


@pytest.mark.parametrize("method", [name for name in METHODS if name.endswith("+shift")])
def test_shifts_are_three_vectors_a_block_more(method: str) -> None:
    counts = [
        sum(parameter.numel() for parameter in initial("base", name, prompts=7, classes=30).parameters())
        for name in (method.removesuffix("+shift"), method)
    ]
    assert counts[1] - counts[0] == 12 * 3 * 768


def test_the_large_model_has_23_gates_and_24_temperatures() -> None:
    module = initial("large")
    assert module.gamma is not None and module.tau is not None
    assert (len(module.gamma), len(module.tau)) == (23, 24)
    batch = module.batch(1)
    assert batch.gate.shape == (1, 23) and len(batch.layout.closed) == 23


@pytest.mark.parametrize(("prior", "gate"), [(1, 0.269), (5, 0.0066929), (10, 4.54e-5), (15, 3.06e-7), (20, 2.06e-9)])
def test_a_gate_init_of_5_means_gates_that_are_nearly_closed(prior: float, gate: float) -> None:
    module = initial("base", prompts=1, gate_init=prior)
    assert module.batch(1).gate.tolist() == [[pytest.approx(gate, rel=2e-3)] * 11]
    assert module.gamma is not None and set(module.gamma.tolist()) == {-prior}


def test_temperatures_start_at_1() -> None:
    tau = initial("base").tau
    assert tau is not None and tau.tolist() == [1.0] * 12


@pytest.mark.parametrize(("method", "layers"), [("gated", 1), ("vpt-deep", 12)])
def test_prompts_start_uniform_within_a_sixteenth(method: str, layers: int) -> None:
    """sqrt(6 / (3 * 16^2 + 768)) = 0.0625, and a uniform law's quartiles in every layer."""
    torch.manual_seed(0)
    prompt = initial("base", method).prompt
    assert prompt is not None and prompt.shape == (layers, 100, 768)
    assert len({layer.sum().item() for layer in prompt}) == layers
    for layer in prompt.detach():
        assert -0.0625 <= layer.min() < -0.0624 and 0.0624 < layer.max() <= 0.0625
        quartiles = layer.flatten().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        assert quartiles == pytest.approx([-0.03125, 0.0, 0.03125], abs=5e-4)


def test_the_papers_head_starts_kaiming_normal_by_fan_out_with_small_probabilities() -> None:
    torch.manual_seed(0)
    head = make_head(768, 200, "kaiming")
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.01)
    assert head.weight.abs().max() > 0.4  # a uniform law of that spread ends at 0.173
    assert head.bias.tolist() == [pytest.approx(-4.59512, abs=1e-5)] * 200
    assert head.bias.sigmoid()[0].item() == pytest.approx(0.01)


@pytest.mark.parametrize(("kind", "std"), [("small", 0.02), ("tiny", 0.01)])
def test_the_head_of_self_prompt_tuning_starts_normal_without_bias(kind: Any, std: float) -> None:
    torch.manual_seed(0)
    head = make_head(768, 200, kind)
    assert head.weight.std().item() == pytest.approx(std, rel=0.01)
    assert head.weight.abs().max() > 4 * std
    assert not head.bias.any()


@pytest.mark.parametrize("method", ["gated", "gated-deep", "vpt-shallow", "vpt-deep"])
def test_dropout_is_drawn_for_each_image_once_at_the_input(tiny: Backbone, method: str) -> None:
    """Image by image through the plain reference, with prompts that were dropped by hand; none in evaluation."""
    recipe = make_recipe("paper", method=method, prompts=5, prompt_dropout=0.4, gate_init=0.5)
    module = build_module(tiny, recipe, 3).train()
    assert isinstance(module, AdapterModule) and module.prompt is not None
    with torch.no_grad():
        module.prompt.mul_(20)  # large enough to matter
    images = random_images(3)
    torch.manual_seed(4)
    trained = module(tiny.model, images)
    torch.manual_seed(4)
    dropped = F.dropout(module.prompt.expand(3, -1, -1, -1), 0.4)
    assert 0.2 < (dropped == 0).float().mean() < 0.6
    evaluated = module.eval()(tiny.model, images)
    for index, image in enumerate(images):
        for actual, prompt in ((trained[index], dropped[index]), (evaluated[index], module.prompt)):
            expected = reference.forward(
                tiny.model,
                image,
                pool="mean",
                head_weight=module.head.weight,
                head_bias=module.head.bias,
                prompt=prompt,
                gamma=module.gamma,
                tau=module.tau,
            )
            torch.testing.assert_close(actual, expected.logits, atol=1e-5, rtol=1e-5)
