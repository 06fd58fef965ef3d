"""What a finished pretraining leaves: weights that ``--checkpoint`` loads, and their model card."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from loop import Recipe
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

PAPERS = {"mae": "masked autoencoder (He et al., 2022), 75 % masked", "mocov3": "MoCo v3 (Chen et al., 2021)"}
POOLING = {"mae": "mean pooling, then norm", "mocov3": "norm, then CLS"}


def save_weights(vit: VisionTransformer, family: str, path: Path) -> None:
    """Write the encoder as float16 by timm's names; ``family`` tells readers how to pool."""
    weights = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in vit.state_dict().items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(weights, temporary, metadata={"family": family})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def card(name: str, recipe: Recipe, trained: str, losses: Sequence[float], measured: Sequence[str]) -> str:
    """The model card in Markdown.

    Args:
        trained: on what, for how long and where, in words.
        measured: lines of a table; none when nothing was.
    """
    rows = {
        "architecture": "timm `vit_tiny_patch16_224` with `img_size=32, patch_size=4, num_classes=0`: 12 blocks, "
        "width 192, 3 heads, 64 patches + CLS; 5.36 M parameters",
        "file": f"`{name}.safetensors`, float16, timm's state-dict names",
        "pretraining": f"{PAPERS[recipe.method]}; AdamW {recipe.lr:g}, betas {recipe.betas}, weight decay "
        f"{recipe.weight_decay:g}, {recipe.warmup:.0%} warm-up, cosine; batch {recipe.batch_size}, seed {recipe.seed}",
        "data": trained,
        "epochs": f"{len(losses)}; loss {losses[0]:.4f} in the first, {losses[-1]:.4f} in the last",
        "input": f"RGB, shorter side 36, centre crop 32x32, bicubic, ImageNet mean and std; {POOLING[recipe.method]}",
    }
    lines = [f"# {name}", "", "A small Vision Transformer pretrained without labels.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    if measured:
        lines += ["", "Test accuracy of frozen features in per cent, ± standard error:", "", *measured]
    return "\n".join(lines) + "\n"
