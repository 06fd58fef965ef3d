"""Move constant arithmetic of the forward pass into copies of the frozen weights.

The folded model is still a timm ``VisionTransformer`` that `gpt_serve.prompted` runs; only its numbers differ. All
folds are exact up to rounding.
"""

import copy
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gpt_serve.prompted import TAU_MAX, TAU_MIN
from gpt_serve.specs import Preprocess


@torch.no_grad()
def fold_backbone(model: VisionTransformer) -> VisionTransformer:
    """A copy of ``model`` with LayerScale in the weights and the prefix tokens' positions in the tokens."""
    folded = copy.deepcopy(model)
    for blk in folded.blocks:
        _fold_layer_scale(blk)
    _fold_positions(folded)
    return folded


@torch.no_grad()
def fold_temperatures(model: VisionTransformer, tau: Tensor) -> None:
    """Let the queries of each block be divided by its temperature: by their norm where there is one, else by ``Wq``.

    Args:
        tau: (L,), clamped as the forward pass does.
    """
    blocks: Any = model.blocks
    for blk, value in zip(blocks, tau.clamp(TAU_MIN, TAU_MAX).tolist(), strict=True):
        attn = blk.attn
        if isinstance(attn.q_norm, nn.Identity):
            _scale(attn.qkv, 1 / value, attn.attn_dim)
        else:
            _scale(attn.q_norm, 1 / value, attn.head_dim)


@torch.no_grad()
def fold_pixels(model: VisionTransformer, preprocess: Preprocess, centre: float) -> None:
    """Let the patch embedding take pixels ``u - centre`` with ``u`` in 0..255: ``(u/255 - mean) / std`` is linear.

    Args:
        centre: 0, or the middle of the range: in float16 small inputs keep their digits.
    """
    proj: Any = model.patch_embed.proj
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess.mean, preprocess.std))
    weight = proj.weight.double()
    offset = torch.einsum("oihw,i->o", weight, (centre / 255 - mean) / std)
    bias = offset if proj.bias is None else offset + proj.bias.double()
    proj.weight = _parameter(weight / (255 * std)[:, None, None], proj.weight)
    proj.bias = _parameter(bias, proj.weight)


def _fold_layer_scale(blk: Any) -> None:
    for name, linear in (("ls1", blk.attn.proj), ("ls2", blk.mlp.fc2)):
        scale = getattr(blk, name)
        if isinstance(scale, nn.Identity):
            continue
        linear.weight = _parameter(linear.weight * scale.gamma[:, None], linear.weight)
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias * scale.gamma, linear.bias)
        setattr(blk, name, nn.Identity())


def _fold_positions(model: Any) -> None:
    """Add the prefix tokens' positions to the tokens, which timm then takes for a model that has none for them."""
    prefix = model.num_prefix_tokens
    if model.pos_embed is None or model.no_embed_class or not prefix:
        return
    position, tokens = model.pos_embed, 0
    for name in ("cls_token", "reg_token"):
        token = getattr(model, name)
        if token is not None:
            count = token.shape[1]
            setattr(model, name, _parameter(token + position[:, tokens : tokens + count], token))
            tokens += count
    model.pos_embed = _parameter(position[:, prefix:], position)
    model.no_embed_class = True


def _scale(module: Any, factor: float, rows: int) -> None:
    """Multiply the first ``rows`` outputs of a linear layer or norm."""
    for name in ("weight", "bias"):
        tensor = getattr(module, name)
        if tensor is not None:
            scaled = tensor.clone()
            scaled[:rows] *= factor
            setattr(module, name, _parameter(scaled, tensor))


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=False)
