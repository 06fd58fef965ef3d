"""What prompts cost: timm's own forward pass against the prompted one, on the same images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt_serve.backbone import Backbone
from gpt_serve.bench.inputs import untrained_adapter
from gpt_serve.bench.timing import Plan, Row, interleave, to_rows
from gpt_serve.prompted import AdapterBatch, embed, prompted_features

BATCHES = (1, 8, 32)
PROMPTS = (0, 10, 50, 100)
BARE = "timm"


def bench_forward(
    backbone: Backbone, plan: Plan, batches: Sequence[int] = BATCHES, prompts: Sequence[int] = PROMPTS
) -> list[Row]:
    """One comparison per batch size: bare, and gated prompts of each length (none: the linear probe)."""
    passes: dict[str, Callable[[Tensor], object]] = {BARE: backbone.model}
    bare = macs(backbone.model, 0)
    extra = {BARE: {"FLOP ratio": 1.0}}
    for count in prompts:
        name = f"prompted, P = {count}"
        passes[name] = _prompted(backbone, count)
        extra[name] = {"FLOP ratio": macs(backbone.model, count) / bare}
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, *backbone.spec.preprocess.input_size).to(backbone.device)
        variants = {name: _finished(run, images) for name, run in passes.items()}
        times = interleave(variants, plan)
        rows += to_rows("forward", backbone.name, f"batch {batch}", batch, times, extra)
    return rows


def _prompted(backbone: Backbone, count: int) -> Callable[[Tensor], object]:
    adapter = untrained_adapter(backbone, "bench", "gated" if count else "linear", count)
    tensors = AdapterBatch.of(adapter, backbone.spec, backbone.device)
    return lambda images: prompted_features(backbone.model, embed(backbone.model, images), tensors)


def _finished(run: Callable[[Tensor], object], images: Tensor) -> Callable[[], None]:
    """``run(images)`` as serving runs it, waiting for a GPU to be done."""

    @torch.inference_mode()
    def call() -> None:
        run(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return call


def macs(model: Any, prompts: int) -> int:
    """Multiply-accumulates of one image: the textbook's count of patches, projections, attention and MLPs.

    Args:
        model: a timm ``VisionTransformer``.
        prompts: ``P`` rows carried through every block.
    """
    patches, width = model.patch_embed.num_patches, model.embed_dim
    rows = model.num_prefix_tokens + patches + prompts
    height, side = model.patch_embed.patch_size
    total: int = patches * 3 * height * side * width
    for blk in model.blocks:
        projections = 4 * width * blk.attn.attn_dim  # q, k, v and the output
        mlp = 2 * width * blk.mlp.fc1.out_features
        attention = 2 * rows * blk.attn.attn_dim  # scores, and the mix of values
        total += rows * (projections + mlp + attention)
    return total
