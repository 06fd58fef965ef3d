"""Gated prompt tuning, written slowly from the paper: the yardstick of the parity tests.

One image, one adapter, one attention head at a time, in the paper's token order (CLS, registers, prompts, patches).
Deliberately independent of ``gpt_serve``: Algorithm 1 and Eqs. 6 to 11 of Yoo et al., ICML 2023, plus what the paper's
text leaves out (scores scaled by ``d ** -0.5``, temperatures clamped, tokens pooled before the pretrained norm).

Shapes: ``L`` blocks, width ``D``, ``P`` prompts, ``N`` patches, ``K`` prefix rows (CLS and registers), ``C`` classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class BlockTrace:
    """One block's rows, each (rows, D)."""

    prompts_in: Tensor  # what the block reads: Z_P of the block before
    prompts_out: Tensor  # what the block makes of them, before the gate: Z~_P
    prompts: Tensor  # what the next block reads: Z_P, after the gate (the last block has no gate)
    prefix: Tensor  # CLS and registers after the block
    patches: Tensor  # patches after the block


@dataclass(frozen=True)
class Result:
    """``blocks``: L traces; ``feature`` (D,): pooled and normed; ``logits`` (C,)."""

    blocks: list[BlockTrace]
    feature: Tensor
    logits: Tensor


def forward(
    model: VisionTransformer,
    image: Tensor,
    *,
    pool: str,
    head_weight: Tensor,
    head_bias: Tensor,
    prompt: Tensor | None = None,
    gamma: Tensor | None = None,
    tau: Tensor | None = None,
    gates: Tensor | None = None,
    first_block: int = 0,
) -> Result:
    """Algorithm 1 for one image (3, H, W) and one adapter.

    ``prompt`` (1, P, D) is shallow, (L, P, D) deep. They enter ``first_block`` (Fig. 1): then ``L`` counts from there
    for deep prompts and gates. Without ``gamma`` (L-1,) gates are 1 for shallow prompts and 0 for
    deep ones; ``gates`` (L-1,) are gates themselves, in place of ``gamma``. Without ``tau`` (L,) temperatures are 1;
    without ``prompt`` this is a linear probe.
    """
    depth = len(model.blocks)
    prefix, patches = embed(model, image)
    if prompt is None:
        prompt = patches.new_zeros(1, 0, patches.shape[1])
    deep = len(prompt) > 1
    prompts = prompt[0] if first_block == 0 else prompt[0, :0]
    traces = []
    for index, block in enumerate(model.blocks):
        temperature = torch.tensor(1.0) if tau is None else tau[index].clamp(0.01, 10.0)
        rows = torch.cat([prefix, prompts, patches])
        rows = transformer_block(block, rows, temperature, rotary_table(model, index))
        prefix, prompts_out, patches = rows.split([len(prefix), len(prompts), len(patches)])
        if index == depth - 1:
            gated = prompts_out
        else:
            ahead = index + 1 - first_block
            if ahead <= 0:
                gated = prompt[0] if ahead == 0 else prompts
            else:
                kept = prompt[ahead] if deep else prompts
                gate = gate_value(gamma, ahead - 1, deep) if gates is None else gates[ahead - 1]
                gated = apply_gate(gate, prompts_out, kept)
        traces.append(BlockTrace(prompts, prompts_out, gated, prefix, patches))
        prompts = gated
    feature = pooled(model, pool, prefix, prompts, patches)
    return Result(traces, feature, head_weight @ feature + head_bias)


def pooled(model: Any, pool: str, prefix: Tensor, prompts: Tensor, patches: Tensor) -> Tensor:
    """The pretrained norm and the pooling: (D,). The mean comes first, unless timm's model itself norms before it."""
    if pool == "attention":  # of patches; timm's Eva counts the prefix among them
        read = torch.cat([prefix, patches]) if isinstance(model, Eva) else patches
        return model.attn_pool(model.norm(read[None]))[0]
    rows = prefix[:1] if pool == "cls" else torch.cat([prompts, patches])
    if getattr(model, "global_pool", "") == "avg" and not isinstance(model.norm, torch.nn.Identity):
        return model.norm(rows).mean(dim=0)
    return model.fc_norm(model.norm(rows.mean(dim=0)))


def gate_value(gamma: Tensor | None, index: int, deep: bool) -> Tensor:
    """Eq. 6, or the constant gate of VPT-shallow (1) and VPT-deep (0)."""
    if gamma is None:
        return torch.tensor(0.0 if deep else 1.0)
    return 1 / (1 + torch.exp(-gamma[index]))


def apply_gate(gate: Tensor, written: Tensor, kept: Tensor) -> Tensor:
    """Eq. 7."""
    return gate * written + (1 - gate) * kept


def embed(model: VisionTransformer, image: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1: the first block's prefix rows (K, D) and patch rows (N, D)."""
    patches = model.patch_embed(image[None])[0]
    prefix = patches.new_zeros(0, patches.shape[1])
    if model.cls_token is not None:
        prefix = torch.cat([prefix, model.cls_token[0]])
    if model.reg_token is not None:
        prefix = torch.cat([prefix, model.reg_token[0]])
    position = torch.zeros(()) if model.pos_embed is None else model.pos_embed[0]
    if model.no_embed_class or model.pos_embed is None:
        patches = patches + position
    else:
        prefix, patches = prefix + position[: len(prefix)], patches + position[len(prefix) :]
    return model.norm_pre(prefix), model.norm_pre(patches)


def rotary_table(model: Any, index: int) -> Tensor | None:
    """Sines and cosines of block ``index`` as timm has them, (N, 2*d) or (H, N, 2*d); None where nothing rotates."""
    if getattr(model, "rope", None) is None:
        return None
    table = model.rope.get_embed()
    return table[index] if model.rope_mixed else table


def transformer_block(block: Any, rows: Tensor, temperature: Tensor, table: Tensor | None = None) -> Tensor:
    """Eq. 2 in evaluation mode: (rows, D) -> (rows, D)."""
    rows = rows + _scaled(block, 1, attention(block, block.norm1(rows), temperature, table))
    return rows + _scaled(block, 2, block.mlp(block.norm2(rows)))


def _scaled(block: Any, part: int, rows: Tensor) -> Tensor:
    """LayerScale, a module of a plain block and a parameter of an Eva block."""
    if hasattr(block, "ls1"):
        return getattr(block, f"ls{part}")(rows)
    gamma = getattr(block, f"gamma_{part}")
    return rows if gamma is None else rows * gamma


def attention(block: Any, rows: Tensor, temperature: Tensor, table: Tensor | None = None) -> Tensor:
    """Eqs. 3 and 9, with the scores scaled by ``d ** -0.5``: every row attends to every row.

    With a rotary ``table`` the queries and keys of patches, which come last, are turned by it, and no others.
    """
    layer = block.attn
    heads, size = layer.num_heads, layer.head_dim
    outputs = []
    for head in range(heads):
        query, key, value = (_head(layer, rows, part, head) for part in range(3))
        query, key = layer.q_norm(query), layer.k_norm(key)
        if table is not None:
            own = table[head] if table.ndim == 3 else table
            query, key = (_turned(x, own, layer.rotate_half) for x in (query, key))
        scores = query @ key.T * size**-0.5 / temperature
        outputs.append(torch.softmax(scores, dim=1) @ value)
    return F.linear(layer.norm(torch.cat(outputs, dim=1)), layer.proj.weight, layer.proj.bias)


def _turned(rows: Tensor, table: Tensor, half: bool) -> Tensor:
    """The last rows (N of them) of one head, turned by timm's own function."""
    first = len(rows) - len(table)
    return torch.cat([rows[:first], apply_rot_embed_cat(rows[first:], table, half=half)])


def _head(layer: Any, rows: Tensor, part: int, head: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of one head: (rows, D) -> (rows, d)."""
    heads, size = layer.num_heads, layer.head_dim
    if layer.qkv is None:
        return _project([layer.q_proj, layer.k_proj, layer.v_proj][part], rows, head * size, size)
    own = _project(layer.qkv, rows, (part * heads + head) * size, size)
    bias = [getattr(layer, name, None) for name in ("q_bias", "k_bias", "v_bias")][part]
    return own if bias is None else own + bias[head * size : (head + 1) * size]


def _project(layer: torch.nn.Linear, rows: Tensor, start: int, size: int) -> Tensor:
    """Rows ``start`` to ``start + size`` of a linear layer's outputs: (rows, D) -> (rows, size)."""
    projected = rows @ layer.weight[start : start + size].T
    return projected if layer.bias is None else projected + layer.bias[start : start + size]


def last_input(prompt: Tensor, gates: list[float], outputs: list[Tensor]) -> Tensor:
    """Eq. 8: the prompts (P, D) that the last block reads.

    ``prompt`` (P, D), the ``L - 1`` gates, and the ``L - 1`` blocks' outputs (P, D) before their gates.
    """
    total = prompt
    for gate in gates:
        total = (1 - gate) * total
    for weight, output in zip(written_weights(gates), outputs, strict=True):
        total = total + weight * output
    return total


def written_weights(gates: list[float]) -> list[float]:
    """Eq. 10: how much of each block's output reaches the last block."""
    weights = []
    for index, gate in enumerate(gates):
        weight = gate
        for later in gates[index + 1 :]:
            weight *= 1 - later
        weights.append(weight)
    return weights


def selection_ratio(gates: list[float]) -> list[float]:
    """Eq. 11: the weights of Eq. 10 as shares that add up to 1 (undefined when every gate is 0)."""
    weights = written_weights(gates)
    return [weight / sum(weights) for weight in weights]


@torch.no_grad()
def edit_biases(block: Block, seed: int) -> Tensor:
    """Add random vectors to the biases of the values, the projection, the second norm and the second MLP layer.

    Returns:
        (3, D): what that adds after attention (behind LayerScale), before the MLP, and after it.
    """
    width = block.norm2.weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    values, projection, norm, mlp = torch.randn(4, width, generator=generator)
    _add_bias(block.attn.qkv, torch.cat([torch.zeros(2 * width), values]))
    _add_bias(block.attn.proj, projection)
    block.norm2.bias.add_(norm)
    _add_bias(block.mlp.fc2, mlp)
    after = block.ls1(block.attn.proj.weight @ values + projection)
    return torch.stack([after, norm, block.ls2(mlp)])


def _add_bias(layer: torch.nn.Linear, vector: Tensor) -> None:
    layer.bias = torch.nn.Parameter(vector if layer.bias is None else layer.bias + vector)
