"""The prompted forward pass: the one definition that training, serving and export call.

Token order is ``[prefix, patches, prompts]``. Prompts have no position embedding and attention is
permutation-equivariant, so this equals the papers' ``[CLS, prompts, patches]``, and a block can leave out the prompts
by working on the first rows only.

A gate is write permission. Where it is closed (exactly 0) the prompts are read, never written: they get no query,
projection or MLP row. Where they still are the adapter's own constants, `remember` computes even their keys and values
beforehand. Under CLS pooling the last block computes the CLS row alone.

Shapes: batch ``B``, adapter rows ``A`` (1 or ``B``), blocks ``L``, width ``D``, heads ``H`` of size ``d``, prompts
``P``, patch tokens ``N``, sequence ``S = prefix + N + P``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.model.batch import AdapterBatch

TAU_MIN = 0.01
TAU_MAX = 10.0

OnBlock = Callable[[int, Tensor], None]


class SplitProjection(nn.Module):
    """In place of an attention's fused ``qkv``: three linear layers (D -> H*d), as exported graphs have them."""

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v


def embed(model: Any, images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) to the input tokens of block 0 without prompts, (B, prefix + N, D) (Eq. 1)."""
    tokens: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    return tokens


def attention(
    attn: Any,
    x: Tensor,
    tau: Tensor | None,
    mask: Tensor | None,
    rows: int | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Multi-head self-attention with scores ``q k^T / (sqrt(d) * tau)`` (Eq. 9).

    Args:
        attn: a timm ``Attention`` module.
        x: (B, S, D), already normalised.
        tau: (A,) temperatures within their range; None for 1.
        mask: (A, 1, 1, S) bool, which keys may be read; None for all.
        rows: how many of the first rows are queries; None for all.
        memory: more keys and values, (A, M, H*d) each, that follow those of ``x``.

    Returns:
        (B, rows, D)
    """
    q, k, v = _tempered(attn, x, tau, rows)
    if memory is not None:
        k, v = (
            torch.cat([own, more.expand(x.shape[0], -1, -1)], dim=1) for own, more in zip((k, v), memory, strict=True)
        )
    return attn.proj(attn.norm(_attend(q, k, v, attn.num_heads, mask)))  # type: ignore[no-any-return]


def attention_weights(blk: Any, x: Tensor, tau: Tensor | None) -> Tensor:
    """``softmax(q k^T / (sqrt(d) * tau))`` of a block (Eqs. 3 and 9), for those who want to look at it.

    Args:
        x: (B, S, D), the tokens that the block is given, all of them: none remembered, none padded.

    Returns:
        (B, H, S, S): query, then key.
    """
    q, k, _ = _tempered(blk.attn, blk.norm1(x), tau, None)
    q, k = (rows.reshape(*rows.shape[:2], blk.attn.num_heads, -1).transpose(1, 2) for rows in (q, k))
    scores: Tensor = q @ k.mT * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


def _tempered(attn: Any, x: Tensor, tau: Tensor | None, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries divided by ``tau``, keys and values as `_project` gives them, after the norms of the heads."""
    q, k, v = _project(attn, x, rows)
    q, k = _norm_heads(attn, attn.q_norm, q), _norm_heads(attn, attn.k_norm, k)
    return q if tau is None else q / tau[:, None, None].to(q.dtype), k, v


def _project(attn: Any, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the first ``rows`` rows (B, rows, H*d), keys and values of all (B, S, H*d)."""
    own = x if rows is None else x[:, :rows]
    if isinstance(attn.qkv, SplitProjection):
        return attn.qkv.q(own), *_keys_and_values(attn, x)
    if rows is None:
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        return q, k, v
    weight, bias, width = attn.qkv.weight, attn.qkv.bias, attn.attn_dim
    q = F.linear(own, weight[:width], None if bias is None else bias[:width])
    return q, *_keys_and_values(attn, x)


def _keys_and_values(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, D) -> two of (B, S, H*d), the keys before their norm."""
    if isinstance(attn.qkv, SplitProjection):
        return attn.qkv.k(x), attn.qkv.v(x)
    weight, bias, width = attn.qkv.weight, attn.qkv.bias, attn.attn_dim
    k, v = F.linear(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
    return k, v


def _norm_heads(attn: Any, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm`` over each head of (B, S, H*d)."""
    if isinstance(norm, nn.Identity):
        return x
    normed: Tensor = norm(x.reshape(*x.shape[:-1], attn.num_heads, attn.head_dim))
    return normed.flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of (B, rows, H*d) queries."""
    if torch.onnx.is_in_onnx_export():  # ONNX's own operator splits the heads itself: one node instead of a dozen
        mask = None if mask is None else mask.expand(-1, -1, q.shape[1], -1)  # onnxruntime does not broadcast rows
        mixed: Tensor = torch.onnx.ops.attention(q, k, v, mask, q_num_heads=heads, kv_num_heads=heads)[0]
        return mixed
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


def block(
    blk: Any,
    x: Tensor,
    tau: Tensor | None,
    mask: Tensor | None,
    rows: int | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The first ``rows`` rows of one frozen pre-norm transformer block (Eq. 2); arguments as in `attention`."""
    own = x if rows is None else x[:, :rows]
    y = own + blk.ls1(attention(blk.attn, blk.norm1(x), tau, mask, rows, memory))
    return y + blk.ls2(blk.mlp(blk.norm2(y)))  # type: ignore[no-any-return]


def remember(model: Any, adapter: AdapterBatch) -> AdapterBatch:
    """``adapter`` with keys and values for the first blocks that only read its prompts while these are constant.

    Deep prompts are constant in every block whose predecessor's gate is closed, shallow ones until the first open gate.

    Args:
        adapter: one adapter, ``A = 1``.
    """
    memory = []
    constant = adapter.plan.constant if adapter.prompts else 0
    for index, blk in list(enumerate(model.blocks))[adapter.first_block : constant]:
        keys, values = _keys_and_values(blk.attn, blk.norm1(adapter.entering(index)))
        memory.append((_norm_heads(blk.attn, blk.attn.k_norm, keys), values))
    return replace(adapter, memory=tuple(memory))


def _in_range(tau: Tensor) -> Tensor:
    """Temperatures clamped to [0.01, 10]; those at a bound keep their gradient, which newer versions of torch cut off.

    The authors clamp the parameter itself: what has reached a bound can come back.
    """
    clamped = tau.clamp(TAU_MIN, TAU_MAX)
    return torch.where(clamped == tau, tau, clamped)


def _gated_prompts(adapter: AdapterBatch, index: int, before: Tensor, after: Tensor) -> Tensor:
    """Prompt rows that block ``index + 1`` reads: ``g*after + (1-g)*z`` (Eq. 7), (B, P, D).

    ``z`` is ``before`` for shallow prompts and the next block's own tokens for deep ones; ``after`` has no rows when
    the gate is closed.
    """
    keep = before
    if adapter.prompt.shape[1] > 1:
        fresh = adapter.entering(index + 1).to(before.dtype).expand_as(before)
        keep = fresh if adapter.deep is None else torch.where(adapter.deep[:, None, None], fresh, before)
    if adapter.plan.closed[index]:
        return keep
    gate = adapter.gate[:, index, None, None]
    return gate * after + (1 - gate) * keep


def final_norm(model: Any) -> nn.Module:
    """The backbone's own pretrained norm, wherever timm keeps it."""
    norm: nn.Module = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return norm


def pool(x: Tensor, adapter: AdapterBatch, prefix: int) -> Tensor:
    """Weighted sum over the rows of (B, S, D) -> (B, D): CLS, or the mean of patches and prompts."""
    if adapter.plan.pool == "cls":
        return x[:, 0]
    rows = x.shape[1]
    valid = adapter.valid(rows - adapter.prompts)
    if adapter.plan.pool == "mean" and valid is None:
        return x[:, prefix:].mean(dim=1)
    position = torch.arange(rows, device=x.device)
    mean = (position >= prefix)[None] if valid is None else valid & (position >= prefix)
    weights = mean.to(x.dtype) / mean.sum(dim=1, keepdim=True)
    if adapter.plan.pool is None:
        weights = torch.where(adapter.mean_pool[:, None], weights, (position == 0).to(x.dtype))
    return torch.matmul(weights[:, None], x)[:, 0]


def prompted_features(
    model: Any,
    tokens: Tensor,
    adapter: AdapterBatch,
    on_block: OnBlock | None = None,
    run_block: Callable[..., Tensor] = block,
) -> Tensor:
    """Run all blocks with prompts, gates and temperatures, then pool, then the backbone's norm.

    Args:
        model: a frozen timm ``VisionTransformer``.
        tokens: (B, prefix + N, D) from `embed`.
        adapter: ``A`` is 1 or ``B``.
        on_block: called as ``on_block(l, x)`` with the tokens that block ``l`` hands on: (B, S, D), without the
            prompt rows before they enter and while they are remembered, and the CLS row alone after the last block
            under CLS pooling.
        run_block: `block`, what ``torch.compile`` made of it, or a function around it that looks at what it is given.

    Returns:
        (B, D) features for the head.
    """
    batch, body, _ = tokens.shape
    valid = adapter.valid(body)
    mask = None if valid is None else valid[:, None, None]
    tau = None if adapter.tau is None else _in_range(adapter.tau)
    last = len(model.blocks) - 1
    entry = adapter.first_block + len(adapter.memory)
    x = tokens
    for index, blk in enumerate(model.blocks):
        inside = index >= adapter.first_block
        memory = adapter.memory[index - adapter.first_block] if inside and index < entry else None
        if adapter.prompts and index == entry:
            x = torch.cat([x, adapter.entering(index).to(x.dtype).expand(batch, -1, -1)], dim=1)
        rows = 1 if index == last and adapter.plan.pool == "cls" else None
        carried = adapter.prompts > 0 and entry <= index < last
        if carried and adapter.plan.closed[index]:
            rows = body
        y = run_block(blk, x, None if tau is None else tau[:, index], mask if inside else None, rows, memory)
        if carried:
            prompts = _gated_prompts(adapter, index, x[:, body:], y[:, body:])
            y = torch.cat([y[:, :body], prompts.to(y.dtype)], dim=1)
        x = y
        if on_block is not None:
            on_block(index, x)
    features: Tensor = final_norm(model)(pool(x, adapter, model.num_prefix_tokens))
    return features
