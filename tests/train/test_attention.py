"""Attention maps against the kernel that the forward pass calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.insight.attention import (
    AttentionMaps,
    adapter_rows,
    attention_maps,
    by_block,
    embed_pixels,
    plot_attention,
    shown_blocks,
)
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import embed, prompted_features
from tests.factories import make_adapter
from tests.tiny_vit import METHODS, random_images, tiny_backbone

Kernel = Callable[..., Tensor]


def kernel_weights(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Fills, block by block, with the weights that torch's attention kernel applies to the values.

    With the identity in place of the values, the kernel's output is its weights.
    """
    seen: list[Tensor] = []
    kernel: Kernel = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        identity = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen.append(kernel(q, k, identity, **options))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch, method: str, pool: Any) -> None:
    backbone = tiny_backbone(pool, qk_norm=True)
    adapter = adapter_rows(backbone, make_adapter(backbone.spec, method=method))
    tokens = embed(backbone.model, random_images(2))
    weights = by_block(backbone.model, tokens, adapter, lambda found: found)
    applied = kernel_weights(monkeypatch)
    with torch.no_grad():
        prompted_features(backbone.model, tokens, adapter)
    assert len(weights) == len(applied) == 3
    for ours, theirs in zip(weights, applied, strict=True):
        assert ours.shape[2] == ours.shape[3] == tokens.shape[1] + adapter.prompts
        torch.testing.assert_close(ours[:, :, : theirs.shape[2]], theirs, atol=1e-5, rtol=0)


def test_looking_changes_nothing(tiny: Backbone) -> None:
    adapter = adapter_rows(tiny, make_adapter(tiny.spec, method="gated"))
    tokens = embed(tiny.model, random_images(2))
    expected = prompted_features(tiny.model, tokens, adapter)
    features: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        features.append(output)

    handle = tiny.model.norm.register_forward_hook(keep)
    try:
        by_block(tiny.model, tokens, adapter, lambda weights: None)
    finally:
        handle.remove()
    assert torch.equal(features[-1], expected)


def pixels(side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)


def maps_of(backbone: Backbone, method: str, **fields: Any) -> tuple[AttentionMaps, list[Tensor]]:
    """The maps of one image, and the weights that they are made of."""
    adapter = make_adapter(backbone.spec, method=method, **fields)
    tokens = embed_pixels(backbone, pixels()[None], adapter.preprocess)
    batch = adapter_rows(backbone, adapter)
    return attention_maps(backbone, tokens, batch), by_block(backbone.model, tokens, batch, lambda found: found[0])


@pytest.mark.parametrize(("pool", "queries"), [("cls", range(1)), ("mean", range(1, 20))])
def test_maps_are_of_the_pooled_rows(pool: Any, queries: range) -> None:
    found, weights = maps_of(tiny_backbone(pool), "gated")  # CLS, 16 patches, 3 prompts
    for number, block in enumerate(weights):
        for head in range(3):
            mean = sum(block[head, query] for query in queries) / len(queries)
            patches = mean[1:17] / mean[1:17].sum() * 16
            torch.testing.assert_close(found.maps[number, head].flatten().float(), patches)
        on_prompts = [block[head, query, 17:].sum().item() for head in range(3) for query in queries]
        assert found.on_prompts[number] == pytest.approx(sum(on_prompts) / len(on_prompts), rel=1e-4)
        rows = [torch.distributions.Categorical(block[head, query]) for head in range(3) for query in queries]
        entropies = [row.entropy().item() for row in rows]
        assert found.entropy[number] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_a_map_lies_as_the_image_does() -> None:
    """One patch unlike all others: the keys that all look at it are where it is."""
    backbone = tiny_backbone("cls")
    grids = []
    for row, column in ((0, 3), (2, 1)):
        image = torch.full((3, 16, 16), 127, dtype=torch.uint8)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = pixels(4)
        backbone.model.pos_embed.data.zero_()
        tokens = embed_pixels(backbone, image[None], backbone.spec.preprocess)
        grid = attention_maps(backbone, tokens, adapter_rows(backbone, None)).maps[0].mean(dim=0)
        other = grid[(row + 1) % 4, column]
        assert (grid - other).abs().argmax().item() == 4 * row + column
        grids.append(grid[row, column])
    torch.testing.assert_close(*grids)


def test_without_prompts_nothing_goes_to_them(tiny: Backbone) -> None:
    assert maps_of(tiny, "linear")[0].on_prompts == [0, 0, 0]


@pytest.mark.parametrize(("depth", "blocks"), [(12, [3, 7, 12]), (24, [6, 14, 24]), (3, [1, 2, 3]), (1, [1])])
def test_early_middle_and_last(depth: int, blocks: list[int]) -> None:
    assert shown_blocks(depth) == blocks


@pytest.mark.slow
@pytest.mark.parametrize("heads", [False, True])
def test_plot(tiny: Backbone, tmp_path: Path, heads: bool) -> None:
    rows = {"without": maps_of(tiny, "linear")[0], "with": maps_of(tiny, "gated")[0]}
    path = tmp_path / "a.png"
    plot_attention(pixels(), rows, [1, 2, 3], "title", path, heads=heads)
    with Image.open(path) as image:
        tall = image.height > image.width
    assert tall == heads  # two rows of three blocks, or six of three heads
    assert list(tmp_path.iterdir()) == [path]


def test_remembered_prompts_are_refused(tiny: Backbone) -> None:
    from gpt_serve.model.prompted import remember

    adapter: AdapterBatch = remember(tiny.model, adapter_rows(tiny, make_adapter(tiny.spec, method="vpt-deep")))
    with pytest.raises(AssertionError):
        by_block(tiny.model, embed(tiny.model, random_images(1)), adapter, lambda weights: None)
