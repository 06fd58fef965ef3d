"""Move constant arithmetic of the forward pass into copies of the frozen weights.

The folded model is still a `ViT` that `gpt_serve.model.prompted` runs; only its numbers differ.
All folds are exact up to rounding.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gpt_serve.model.prompted import TAU_MAX, TAU_MIN, SplitProjection
from gpt_serve.model.vit import ViT
from gpt_serve.specs import Preprocess


@torch.no_grad()
def fold_backbone(model: ViT) -> ViT:
    """Copy ``model``, with LayerScale in the weights, ``qkv`` as three layers and positions in the prefix tokens."""
    folded = copy.deepcopy(model)
    blocks: Any = folded.blocks
    for blk in blocks:
        _fold_layer_scale(blk)
        _split_projection(blk.attn)
    _fold_positions(folded)
    return folded


@torch.no_grad()
def fold_temperatures(model: ViT, tau: Tensor) -> None:
    """Let the queries of each block be divided by its temperature: by their norm where there is one, else by ``Wq``.

    Args:
        model: from `fold_backbone`.
        tau: (L,), clamped as the forward pass does.
    """
    blocks: Any = model.blocks
    for blk, value in zip(blocks, tau.clamp(TAU_MIN, TAU_MAX).tolist(), strict=True):
        attn = blk.attn
        if isinstance(attn.q_norm, nn.Identity):
            _scale(attn.qkv.q, 1 / value)
        else:
            _scale(attn.q_norm, 1 / value)


@torch.no_grad()
def fold_shifts(model: ViT, shift: Tensor) -> None:
    """Let the biases of each block's projection, second norm and second MLP layer add its shifts.

    Args:
        model: from `fold_backbone`, which has no LayerScale left between a bias and the sum.
        shift: (L, 3, D), see `prompted.block`.
    """
    blocks: Any = model.blocks
    for blk, vectors in zip(blocks, shift, strict=True):
        for module, vector in zip((blk.attn.proj, blk.norm2, blk.mlp.fc2), vectors, strict=True):
            module.bias = _parameter(vector if module.bias is None else module.bias + vector, vector)


@torch.no_grad()
def fold_pixels(model: ViT, preprocess: Preprocess, centre: float) -> None:
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


def _split_projection(attn: Any) -> None:
    """Replace ``qkv`` by three projections, without the biases that attention does not need.

    A bias of the keys adds the same to all scores of a query, which the softmax cancels, unless keys are normed or
    rotated after it. A bias of the values adds itself to every mix of values, as weights sum to 1, and so goes through
    the output projection.
    """
    weights = attn.qkv.weight.chunk(3)
    biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    q, k, v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    if isinstance(attn.k_norm, nn.Identity) and attn.rotation is None:
        k.bias = None
    if isinstance(attn.norm, nn.Identity) and v.bias is not None:
        mixed = attn.proj.weight @ v.bias
        attn.proj.bias = _parameter(mixed if attn.proj.bias is None else attn.proj.bias + mixed, mixed)
        v.bias = None
    attn.qkv = SplitProjection(q, k, v)


def _linear(weight: Tensor, bias: Tensor | None) -> Any:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(weight, weight)
    layer.bias = None if bias is None else _parameter(bias, bias)  # type: ignore[assignment]
    return layer


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


def _scale(module: Any, factor: float) -> None:
    """Multiply the outputs of a linear layer or norm."""
    for name in ("weight", "bias"):
        tensor = getattr(module, name)
        if tensor is not None:
            setattr(module, name, _parameter(tensor * factor, tensor))


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=False)
