"""Where a backbone looks, with an adapter and without (Fig. 5 of the paper).

The paper does not say whose attention it shows. Here it is that of the rows which are pooled, for these make the
feature that the head sees: the CLS token, or the mean over patches and prompts.

Shapes: blocks ``L``, heads ``H``, patch grid ``(h, w)`` with ``N = h * w``, sequence ``S = prefix + N + P``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.images.preprocess import normalize
from gpt_serve.insight.figures import save_figure
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import attention_weights, block, embed, prompted_features
from gpt_serve.specs import Preprocess

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The attention of the pooled rows on one image, block 1 first.

    Attributes:
        maps: (L, H, h, w), attention on each patch as a multiple of what it were if all patches got the same.
        on_prompts: (L,) share of the attention that goes to prompts, mean over heads.
        entropy: (L,) of the attention over all keys, in nats, mean over queries and heads; at most ``ln S``.
    """

    maps: Tensor
    on_prompts: list[float]
    entropy: list[float]


def shown_blocks(depth: int) -> list[int]:
    """An early, a middle and the last block, counted from 1: 3, 7 and 12 of 12, as in Fig. 5."""
    return sorted({max(1, round(depth / 4)), max(1, round(depth * 7 / 12)), depth})


@torch.no_grad()
def by_block(model: Any, tokens: Tensor, adapter: AdapterBatch, measure: Callable[[Tensor], T]) -> list[T]:
    """``measure`` of each block's attention weights, (B, H, S, S) query by key, in the one forward pass.

    Args:
        tokens: (B, prefix + N, D) from `embed`.
        adapter: nothing remembered, so that each block is given all of its tokens.
    """
    assert not adapter.kv
    measured = []

    def watch(blk: Any, x: Tensor, tau: Tensor | None, *rest: Any) -> Tensor:
        measured.append(measure(attention_weights(blk, x, tau)))
        return block(blk, x, tau, *rest)

    prompted_features(model, tokens, adapter, run_block=watch)
    return measured


def adapter_rows(backbone: Backbone, adapter: Adapter | None) -> AdapterBatch:
    """``adapter`` on the backbone's device; for None, the backbone alone."""
    if adapter is not None:
        return AdapterBatch.of(adapter, backbone.spec, backbone.device)
    spec = backbone.spec
    return AdapterBatch.single(depth=spec.depth, width=spec.width, pool=spec.pool, device=backbone.device)


def embed_pixels(backbone: Backbone, images: Tensor, preprocess: Preprocess) -> Tensor:
    """Preprocessed images, (B, 3, H, W) from 0 to 255 of any type, as tokens (B, prefix + N, D)."""
    mean, std = (torch.tensor(value, device=backbone.device) for value in (preprocess.mean, preprocess.std))
    return embed(backbone.model, normalize(images.to(backbone.device), mean, std).to(backbone.dtype))


def attention_maps(backbone: Backbone, tokens: Tensor, adapter: AdapterBatch) -> AttentionMaps:
    """The maps of one image: of the rows that the last block's pooling reads.

    Args:
        tokens: (1, prefix + N, D) from `embed`.
        adapter: one adapter, from `adapter_rows`.
    """
    prefix, body = backbone.model.num_prefix_tokens, tokens.shape[1]
    pooled = slice(0, 1) if adapter.layout.reads_class_token_last else slice(prefix, None)

    def measure(weights: Tensor) -> tuple[Tensor, float, float]:
        rows = weights[0, :, pooled].double()
        entropy = -torch.xlogy(rows, rows).sum(dim=-1).mean().item()
        keys = rows.mean(dim=1)
        return keys[:, prefix:body], keys[:, body:].sum(dim=1).mean().item(), entropy

    measured = by_block(backbone.model, tokens, adapter, measure)
    maps, on_prompts, entropy = zip(*measured, strict=True)
    patches = torch.stack(maps)
    tiny = torch.finfo(patches.dtype).tiny  # where prompts get all of the attention
    relative = (patches / patches.mean(dim=-1, keepdim=True).clamp(min=tiny)).cpu()
    grid = backbone.model.patch_embed.grid_size
    return AttentionMaps(relative.view(*relative.shape[:2], *grid), list(on_prompts), list(entropy))


def plot_attention(
    image: Tensor, rows: Mapping[str, AttentionMaps], blocks: Sequence[int], title: str, path: Path, *, heads: bool
) -> None:
    """Write the maps over the image, as the network saw it, as a PNG.

    A column for each block and a line for each of ``rows``; with ``heads`` a column for each head and a line for each
    block and each of ``rows``. Colours are a block's own, the same in all of ``rows``.

    Args:
        image: uint8 (3, H, W).
        rows: what to call the maps, and the maps.
        blocks: which, counted from 1.
    """
    from matplotlib.figure import Figure

    columns = next(iter(rows.values())).maps.shape[1] if heads else len(blocks)
    lines = len(rows) * (len(blocks) if heads else 1)
    side = 1.7 if heads else 2.4
    figure = Figure(figsize=(side * (columns + 1) + 1, side * lines + 1), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(lines, columns + 1, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel in panels[:, 0]:
        panel.imshow(image.permute(1, 2, 0).numpy())
    for index, number in enumerate(blocks):
        maps = [found.maps[number - 1] for found in rows.values()]
        if heads:
            group = panels[index * len(rows) : (index + 1) * len(rows)]
            labels = [f"block {number}, {name}" for name in rows]
            cells, shown = group[:, 1:], torch.stack(maps)
        else:
            group, labels = panels, list(rows)
            cells, shown = panels[:, index + 1 : index + 2], torch.stack(maps).mean(dim=1, keepdim=True)
        for panel, label in zip(group[:, 0], labels, strict=True):
            panel.set_title(label, fontsize=9)
        for head, panel in enumerate(cells[0], start=1):
            panel.set_title(f"head {head}" if heads else f"block {number}", fontsize=9)
        _overlay(figure, cells, image, shown, "right" if heads else "bottom")
    save_figure(figure, path, dpi=130)


def _overlay(figure: "Figure", cells: Any, image: Tensor, maps: Tensor, bar: Literal["right", "bottom"]) -> None:
    """Maps (rows, columns, h, w) over the grey image, a panel for each, each patch spread over its pixels."""
    height, width = image.shape[1:]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    grey, top = image.float().mean(dim=0).numpy(), maps.max().item()
    for panel, values in zip(cells.flat, maps.flatten(0, 1).numpy(), strict=True):
        panel.imshow(grey, cmap="gray", extent=extent)
        style = {"cmap": "inferno", "alpha": 0.6, "vmin": 0, "vmax": top, "interpolation": "bilinear"}
        shown = panel.imshow(values, extent=extent, **style)
    figure.colorbar(shown, ax=cells, location=bar, shrink=0.8, label="times uniform")
