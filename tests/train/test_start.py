"""Prompts from tokens, against tokens of the plain reference."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.methods.prompts import AdapterModule, PromptInit
from gpt_serve.train.methods.start import (
    POOLS,
    Centres,
    Drawn,
    Windows,
    images_to_read,
    patch_tokens,
    prompts_from_tokens,
    start_from_data,
    window_size,
)
from gpt_serve.train.recipes.recipe import Recipe, make_recipe
from tests import reference
from tests.tiny_vit import PREPROCESS, tiny_backbone
from tests.train.conftest import Recorder

SEED = (0, 0)


@pytest.fixture(scope="module")
def view(colours: Path) -> View:
    return View(open_dataset(str(colours), 0).train, PREPROCESS, None, "none", 0)


def plain_tokens(backbone: Backbone, image: Tensor) -> list[Tensor]:
    """What each layer's prompts may start from, of one uint8 image: (N, D) for each of the L layers."""
    pixels = normalize(image[None], torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std))[0]
    width = backbone.spec.width
    traced = reference.forward(
        backbone.model, pixels, pool="mean", head_weight=torch.zeros(1, width), head_bias=torch.zeros(1)
    )
    return [backbone.model.patch_embed(pixels[None])[0], *(trace.patches for trace in traced.blocks[:-1])]


def all_tokens(backbone: Backbone, view: View) -> list[Tensor]:
    layers = zip(*(plain_tokens(backbone, view[index][0]) for index in range(len(view))), strict=True)
    return [torch.cat(layer) for layer in layers]


def distances(some: Tensor, others: Tensor) -> Tensor:
    """The largest difference in any coordinate between rows, (n, m); torch.cdist rounds too much."""
    return (some[:, None] - others).abs().amax(dim=2)


def chunks(tokens: Tensor, size: int) -> Iterator[Tensor]:
    yield from tokens.split(size)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_tokens_of_each_layer_are_those_of_the_plain_forward(view: View, options: dict[str, object]) -> None:
    """No position embedding and no norm in layer 0; block i - 1's patches, without CLS and registers, in layer i."""
    backbone = tiny_backbone(**options)
    images = torch.stack([view[index][0] for index in range(3)])
    layers = list(patch_tokens(backbone, images, PREPROCESS))
    assert len(layers) == backbone.spec.depth
    for index in range(3):
        for layer, expected in zip(layers, plain_tokens(backbone, images[index]), strict=True):
            torch.testing.assert_close(layer[index], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("layers", "prompts"), [(1, 7), (3, 7), (3, 40)])
def test_drawn_prompts_are_different_tokens_of_their_own_layer(
    tiny: Backbone, view: View, layers: int, prompts: int
) -> None:
    found = prompts_from_tokens(tiny, view, "tokens", (layers, prompts), seed=0, workers=0)
    assert found.shape == (layers, prompts, 24)
    for prompt, tokens in zip(found, all_tokens(tiny, view), strict=False):
        assert distances(prompt, tokens).min(dim=1).values.max() < 1e-4
    again = prompts_from_tokens(tiny, view, "tokens", (layers, prompts), seed=0, workers=0)
    other = prompts_from_tokens(tiny, view, "tokens", (layers, prompts), seed=1, workers=0)
    assert torch.equal(found, again) and not torch.equal(found, other)


@pytest.mark.parametrize("chunk", [1, 16, 1000])
def test_drawing_takes_no_token_twice(chunk: int) -> None:
    tokens = torch.arange(50.0)[:, None]
    pool = Drawn(50, 50, SEED)
    for part in chunks(tokens, chunk):
        pool.add(part)
    assert torch.equal(pool.prompts(), tokens)


@pytest.mark.parametrize(
    ("total", "prompts", "size"),
    [
        (1000, 20, 52),  # 19 windows of 52 and a remainder of 12
        (190, 20, 9),  # 19 windows of 10 would leave none for the 20th
        (10, 8, 1),
        (8, 8, 1),
        (30, 1, 30),
        (31, 2, 15),  # 2 windows of 31 // 1 would need a remainder
    ],
)
def test_windows(total: int, prompts: int, size: int) -> None:
    assert window_size(total, prompts) == size


@pytest.mark.parametrize("prompts", range(1, 25))
def test_there_are_enough_windows_for_every_prompt(prompts: int) -> None:
    for total in range(prompts, 130):
        size = window_size(total, prompts)
        assert size >= 1 and prompts <= -(-total // size) <= 2 * prompts


@pytest.mark.parametrize("init", ["mean", "max"])
@pytest.mark.parametrize("chunk", [1, 16, 1000])
@pytest.mark.parametrize(("total", "prompts"), [(100, 4), (100, 8), (57, 57), (57, 1)])
def test_pooled_prompts_are_those_of_whole_windows(total: int, prompts: int, chunk: int, init: PromptInit) -> None:
    tokens = torch.randn(total, 5, generator=torch.Generator().manual_seed(0))
    pool = POOLS[init](total, prompts, SEED)
    for part in chunks(tokens, chunk):
        pool.add(part)
    found = pool.prompts()
    windows = [part.amax(0) if init == "max" else part.mean(0) for part in tokens.split(window_size(total, prompts))]
    assert found.shape == (prompts, 5)
    nearest = distances(found, torch.stack(windows)).min(dim=1)
    assert nearest.values.max() < 1e-5
    assert len(nearest.indices.unique()) == prompts


def test_any_window_may_become_a_prompt() -> None:
    """22 windows of 9 tokens for 20 prompts: none is always left out."""
    drawn: set[float] = set()
    for seed in range(20):
        pool = Windows(190, 20, (seed, 0))
        pool.add(torch.arange(190)[:, None] // 9)
        drawn |= set(pool.prompts().flatten().tolist())
    assert drawn == set(range(22))


@pytest.mark.parametrize(("total", "chunk"), [(600, 7), (4000, 100), (4000, 3000)])
def test_centres_find_the_clusters(total: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    means = 10 * torch.randn(5, 4, generator=generator)
    which = torch.randint(0, 5, (total,), generator=generator)
    tokens = means[which] + 0.1 * torch.randn(total, 4, generator=generator)
    pool = Centres(total, 5, SEED)
    for part in chunks(tokens, chunk):
        pool.add(part)
    nearest = distances(pool.prompts(), means).min(dim=1)
    assert nearest.values.max() < 0.3 and len(nearest.indices.unique()) == 5


def test_as_many_centres_as_tokens_in_small_parts() -> None:
    tokens = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    pool = Centres(20, 20, SEED)
    for part in chunks(tokens, 6):
        pool.add(part)
    assert distances(pool.prompts(), tokens).min(dim=1).values.max() < 1e-5


@pytest.mark.parametrize("init", ["kmeans", "mean", "max"])
@pytest.mark.parametrize("method", ["spt-shallow", "gated-deep"])
def test_every_initialisation_goes_with_shallow_and_deep_prompts(
    tiny: Backbone, view: View, tmp_path: Path, method: str, init: PromptInit
) -> None:
    recipe = Recipe(method=method, prompts=6, prompt_init=init)
    module = build_module(tiny, recipe, 3)
    assert module.prompt is not None
    head, random = module.head.weight.clone(), module.prompt.clone()
    assert isinstance(module, AdapterModule)
    start_from_data(tiny, module, TrainingJob("t", "", tmp_path, recipe, workers=0), view, Inputs(0), Recorder())
    assert module.prompt.requires_grad and not torch.equal(module.prompt, random)
    assert torch.equal(module.head.weight, head)
    # Pooled tokens lie within the range of their own layer's tokens.
    for prompt, tokens in zip(module.prompt, all_tokens(tiny, view), strict=False):
        assert (prompt <= tokens.amax(0) + 1e-4).all() and (prompt >= tokens.amin(0) - 1e-4).all()


@pytest.mark.parametrize(
    ("init", "prompts", "read"), [("tokens", 5, 5), ("tokens", 500, 100), ("mean", 5, 30), ("kmeans", 800, 50)]
)
def test_images_that_are_read(init: PromptInit, prompts: int, read: int) -> None:
    assert images_to_read(100, 16, init, prompts) == read


@pytest.mark.parametrize("init", ["tokens", "kmeans", "mean", "max"])
def test_more_prompts_than_tokens_are_refused(tiny: Backbone, view: View, init: PromptInit) -> None:
    few = View(view.samples[:2], PREPROCESS, None, "none", 0)
    reason = "fewer tokens than k-means has centres" if init == "kmeans" else "fewer tokens than that to draw from"
    with pytest.raises(UsageError, match=f"--prompts 33: the 2 training images have 32 patch tokens, {reason}"):
        prompts_from_tokens(tiny, few, init, (1, 33), seed=0, workers=0)
    assert prompts_from_tokens(tiny, few, init, (1, 32), seed=0, workers=0).shape == (1, 32, 24)


def test_memory_does_not_grow_with_the_images(tiny: Backbone, view: View) -> None:
    pools = [Drawn(10_000, 4, SEED), Windows(10_000, 4, SEED), Centres(10_000, 4, SEED)]
    for _ in range(100):
        for pool in pools:
            pool.add(torch.randn(100, 3))
    drawn, windows, centres = pools
    assert sum(map(len, drawn.kept)) == 4  # type: ignore[attr-defined]
    assert len(windows.done) <= 5  # type: ignore[attr-defined]
    assert sum(map(len, centres.waiting)) == 0  # type: ignore[attr-defined]


def test_a_recipe_uses_its_methods_own_start_unless_told_otherwise() -> None:
    assert Recipe(method="spt-deep").to_dict()["prompt_init"] == "tokens"
    assert Recipe(method="spt-deep", prompt_init="random").to_dict()["prompt_init"] == "random"
    assert Recipe(method="gated").to_dict()["prompt_init"] == "random"
    with pytest.raises(UsageError, match="--prompt-init tokens: the method linear has no prompts"):
        Recipe(method="linear", prompt_init="tokens")


def test_training_starts_from_tokens_and_resumes(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    recipe = make_recipe("spt", method="spt-deep", prompts=4, epochs=3, warmup=1, batch_size=8, prompt_init="kmeans")
    work = TrainingJob("colours", str(colours), tmp_path / "whole", recipe)
    train_adapter(tiny, work, Recorder(), World())
    parts = dataclasses.replace(work, adapters=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tiny, parts, Recorder(interrupt_at=1), World())
    train_adapter(tiny, dataclasses.replace(parts, resume=True), Recorder(), World())
    whole, resumed = (AdapterStore(tmp_path / name).load("colours").adapter for name in ("whole", "parts"))
    assert whole.prompt is not None and resumed.prompt is not None
    assert torch.equal(whole.prompt, resumed.prompt)
    assert np.isfinite(whole.prompt.numpy()).all() and whole.method == "spt-deep"
