"""The prompted forward pass: the one definition that training, serving and export call.

Token order is ``[prefix, patches, prompts]``. Prompts have no position embedding and attention is
permutation-equivariant, so this equals the papers' ``[CLS, prompts, patches]``, and a block can leave out the prompts
by working on the first rows only.

A gate is write permission. Where it is closed (exactly 0) the prompts are read, never written: they get no query,
projection or MLP row. Where they still are the adapter's own constants, `remember` computes even their keys and values
beforehand. Where the head reads the CLS token alone, the last block computes its row alone.

Blocks before the first that any adapter touches (the trunk) may compute fewer images than there are rows: several tasks
of one image share them.

Shapes: batch ``B``, adapter rows ``A`` (1 or ``B``), blocks ``L``, width ``D``, heads ``H`` of size ``d``, prompts
``P``, patch tokens ``N``, sequence ``S = prefix + N + P``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.model.batch import AdapterBatch
from gpt_serve.specs import OF_PATCHES, Tap

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
    tokens: Tensor = model.embed(images)
    return tokens


def attention(
    attn: Any,
    x: Tensor,
    tau: Tensor | None,
    mask: Tensor | None,
    rows: int | None = None,
    kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Multi-head self-attention with scores ``q k^T / (sqrt(d) * tau)`` (Eq. 9).

    Args:
        attn: a `vit.Attention`.
        x: (B, S, D), already normalised.
        tau: (A,) temperatures within their range; None for 1.
        mask: (A, 1, 1, S) bool, which keys may be read; None for all.
        rows: how many of the first rows are queries; None for all.
        kv: more keys and values, (A, M, H*d) each, that follow those of ``x``.

    Returns:
        (B, rows, D)
    """
    q, k, v = _tempered(attn, x, tau, rows)
    if kv is not None:
        k, v = (torch.cat([own, more.expand(x.shape[0], -1, -1)], dim=1) for own, more in zip((k, v), kv, strict=True))
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
    """Queries divided by ``tau``, keys and values as `_project` gives them, after norms of the heads and rotation."""
    q, k, v = _project(attn, x, rows)
    q, k = _norm_heads(attn, attn.q_norm, q), _norm_heads(attn, attn.k_norm, k)
    if attn.rotation is not None:
        q = attn.rotation(q) if rows is None or rows > attn.rotation.prefix else q  # of the CLS row alone: as it is
        k = attn.rotation(k)
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
    kv: tuple[Tensor, Tensor] | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The first ``rows`` rows of one frozen pre-norm transformer block (Eq. 2); arguments as in `attention`.

    Args:
        shift: (A, 3, D), added to what attention adds, to what the MLP reads, and to what the MLP adds: all that
            learned biases of values, projection, second norm and second MLP layer can do.
    """
    own = x if rows is None else x[:, :rows]
    y = own + blk.ls1(attention(blk.attn, blk.norm1(x), tau, mask, rows, kv))
    if shift is None:
        return y + blk.ls2(blk.mlp(blk.norm2(y)))  # type: ignore[no-any-return]
    after_attention, before_mlp, after_mlp = shift.to(y.dtype)[:, :, None].unbind(1)
    y = y + after_attention
    return y + blk.ls2(blk.mlp(blk.norm2(y) + before_mlp)) + after_mlp  # type: ignore[no-any-return]


def remember(model: Any, adapter: AdapterBatch) -> AdapterBatch:
    """``adapter`` with keys and values for the first blocks that only read its prompts, see `Layout.constant`.

    Args:
        adapter: one adapter, ``A = 1``, of which nothing is remembered yet.
    """
    layout = adapter.layout
    kv = []
    for index in range(layout.first_block, layout.first_block + layout.constant):
        blk = model.blocks[index]
        keys, values = _keys_and_values(blk.attn, blk.norm1(adapter.entering(index)))
        kv.append((_norm_heads(blk.attn, blk.attn.k_norm, keys), values))
    prompt = adapter.prompt[:, layout.constant :] if layout.layers > 1 else adapter.prompt
    return replace(adapter, prompt=prompt, kv=tuple(kv), layout=replace(layout, remembered=layout.constant))


@dataclass(frozen=True, eq=False)
class Trunk:
    """What the blocks that no adapter touches make of images; `tapped_features` goes on from there.

    Attributes:
        block: the first block that is left to compute.
        tokens: (B, prefix + N, D), what that block reads.
        tapped: what taps of the blocks before it read, (B, D) or (B, N, D) each.
    """

    block: int
    tokens: Tensor
    tapped: Mapping[Tap, Tensor]

    def to(self, device: torch.device) -> "Trunk":
        """The same on ``device``."""
        tapped = {tap: features.to(device, non_blocking=True) for tap, features in self.tapped.items()}
        return Trunk(self.block, self.tokens.to(device, non_blocking=True), tapped)


def run_trunk(model: Any, tokens: Tensor, blocks: int, taps: Iterable[Tap]) -> Trunk:
    """Run the first ``blocks`` blocks as they are, and those of ``taps`` that read one of them."""
    body, taps = tokens.shape[1], tuple(taps)
    tapped: dict[Tap, Tensor] = {}
    x = tokens
    for index in range(blocks):
        x = block(model.blocks[index], x, None, None)
        tapped |= {tap: _read(model, tap, x, body, None) for tap in taps if tap.block == index}
    return Trunk(blocks, x, tapped)


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
    if adapter.layout.layers > 1:
        fresh = adapter.entering(index + 1).to(before.dtype).expand_as(before)
        keep = fresh if adapter.deep is None else torch.where(adapter.deep[:, None, None], fresh, before)
    if adapter.layout.closed[index]:
        return keep
    gate = adapter.gate[:, index, None, None]
    return gate * after + (1 - gate) * keep


def _read(model: Any, tap: Tap, x: Tensor, body: int, valid: Tensor | None) -> Tensor:
    """What ``tap`` makes of the tokens after its block: (B, D), or (B, N, D) for all patches.

    Args:
        x: (B, prefix + N or more, D).
        body: ``prefix + N``.
        valid: (A, S) bool, which rows of ``x`` are real; None for all.
    """
    norm, prefix = model.final_norm, model.num_prefix_tokens
    if tap.pool == "attention":
        pooled: Tensor = model.attn_pool(norm(x[:, model.pooled_from : body]))
        return pooled
    if model.norm_first and tap.pool in ("mean", "patches"):
        return _pooled(tap, norm(x), prefix, body, valid)
    pooled = _pooled(tap, x, prefix, body, valid)
    return pooled if tap.pool == "raw" else norm(pooled)


def _hand_on(
    model: Any, tap: Tap, x: Tensor, body: int, valid: Tensor | None, images: Tensor | None, patch_rows: Tensor | None
) -> Tensor:
    """`_read` for each row, whose images are ``images`` where rows share some; of patches for ``patch_rows`` alone."""
    if tap.pool in OF_PATCHES and patch_rows is not None:
        return _read(model, tap, x[patch_rows if images is None else images[patch_rows]], body, None)
    features = _read(model, tap, x, body, valid)
    return features if images is None else features[images]


def _pooled(tap: Tap, x: Tensor, prefix: int, body: int, valid: Tensor | None) -> Tensor:
    """The pooling of `_read` without the norm."""
    if tap.pool == "cls":
        return x[:, 0]
    if tap.pool in ("grid", "raw"):
        return x[:, prefix:body]
    if tap.pool == "patches":
        return x[:, prefix:body].mean(dim=1)
    if valid is None:
        return x[:, prefix:].mean(dim=1)
    mean = valid & (torch.arange(x.shape[1], device=x.device) >= prefix)
    weights = mean.to(x.dtype) / mean.sum(dim=1, keepdim=True)
    return torch.matmul(weights[:, None], x)[:, 0]


def _rows_read(adapter: AdapterBatch, index: int, rows: int, body: int) -> int | None:
    """How many of the ``rows`` of block ``index``, counted from the first, are read by anyone; None for all."""
    layout = adapter.layout
    if index == layout.last and layout.reads_class_token_last:
        return 1
    only_read = layout.reads_prompts_last if index == layout.last else layout.closed[index]
    return body if rows > body and only_read else None


def tapped_features(
    model: Any,
    tokens: Tensor | Trunk,
    adapter: AdapterBatch,
    on_block: OnBlock | None = None,
    run_block: Callable[..., Tensor] = block,
) -> tuple[Tensor, ...]:
    """Run the blocks with prompts, gates, temperatures and shifts; at each tap pool and apply the backbone's norm.

    Args:
        model: a frozen `vit.ViT`.
        tokens: (B, prefix + N, D) from `embed`, or (U, prefix + N, D) where ``adapter.images`` tells rows' images; or
            what blocks that ``adapter`` does not touch have made of these.
        adapter: ``A`` is 1 or ``B``.
        on_block: called as ``on_block(l, x)`` with the tokens that block ``l`` hands on: (B, S, D), without the prompt
            rows before they enter and while they are remembered, and with those rows alone that a tap reads after the
            last block.
        run_block: `block`, what ``torch.compile`` made of it, or a function around it that looks at what it is given.

    Returns:
        For each tap of the layout (B, D), or (G, N, D) for one of all patches, of ``adapter.patch_rows`` alone.
    """
    begun = tokens if isinstance(tokens, Trunk) else Trunk(0, tokens, {})
    layout, body = adapter.layout, begun.tokens.shape[1]
    valid = adapter.valid(body)
    mask = None if valid is None else valid[:, None, None]
    tau = None if adapter.tau is None else _in_range(adapter.tau)
    x, images = begun.tokens, adapter.images
    tapped = {tap: features if images is None else features[images] for tap, features in begun.tapped.items()}
    for index in range(begun.block, layout.last + 1):
        if images is not None and index == layout.trunk:
            x, images = x[images], None
        if adapter.prompts and index == layout.entry:
            x = torch.cat([x, adapter.entering(index).to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
        inside = adapter.prompts > 0 and index >= layout.first_block
        carried = inside and layout.entry <= index < layout.last
        own = index >= layout.trunk
        y = run_block(
            model.blocks[index],
            x,
            tau[:, index] if own and tau is not None else None,
            mask if inside else None,
            _rows_read(adapter, index, x.shape[1], body),
            adapter.kv[index - layout.first_block] if inside and index < layout.entry else None,
            adapter.shift[:, index] if own and adapter.shift is not None else None,
        )
        if carried:
            prompts = _gated_prompts(adapter, index, x[:, body:], y[:, body:])
            y = torch.cat([y[:, :body], prompts.to(y.dtype)], dim=1)
        x = y
        for tap in layout.taps:
            if tap.block == index:
                tapped[tap] = _hand_on(model, tap, x, body, valid, images, adapter.patch_rows)
        if on_block is not None:
            on_block(index, x)
    return tuple(tapped[tap] for tap in layout.taps)


def prompted_features(
    model: Any,
    tokens: Tensor | Trunk,
    adapter: AdapterBatch,
    on_block: OnBlock | None = None,
    run_block: Callable[..., Tensor] = block,
) -> Tensor:
    """The features of `tapped_features` side by side, (B, K*D), for a linear head of the same taps."""
    return torch.cat(tapped_features(model, tokens, adapter, on_block, run_block), dim=-1)
