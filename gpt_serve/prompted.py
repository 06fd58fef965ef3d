"""The prompted forward pass: the one definition that training, serving and export call.

Token order is ``[prefix, patches, prompts]``. Prompts have no position embedding and attention is
permutation-equivariant, so this equals the papers' ``[CLS, prompts, patches]``.

Shapes: batch ``B``, adapter rows ``A`` (1 or ``B``), blocks ``L``, width ``D``, prompts ``P``, patch tokens ``N``,
sequence ``S = prefix + N + P``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.adapter import Adapter
from gpt_serve.specs import BackboneSpec, Pool

TAU_MIN = 0.01
TAU_MAX = 10.0

OnBlock = Callable[[int, Tensor], None]


@dataclass(frozen=True, eq=False)
class AdapterBatch:
    """The tensors of one adapter for every row (``A = 1``) or of one adapter per row (``A = B``).

    Attributes:
        prompt: (A, 1 or L, P, D). One layer: the tokens enter block 0 and are carried on. ``L`` layers: each
            block has tokens of its own.
        gate: (A, L-1) in [0, 1], the gate of blocks 0..L-2; the last block has none.
        tau: (A, L) attention temperatures, clamped to [0.01, 10] on use.
        mean_pool: (A,) bool; mean over patches and prompts where true, the CLS row where false.
        deep: (A,) bool, which rows take fresh tokens in each block; None when ``prompt``'s layers say so for all.
        counts: (A,) int, prompts of each row when rows are padded to ``P``; None when every row has ``P``.
    """

    prompt: Tensor
    gate: Tensor
    tau: Tensor
    mean_pool: Tensor
    deep: Tensor | None = None
    counts: Tensor | None = None

    @classmethod
    def single(
        cls,
        *,
        depth: int,
        width: int,
        pool: Pool,
        prompt: Tensor | None = None,
        gamma: Tensor | None = None,
        tau: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "AdapterBatch":
        """One adapter as a batch of ``A = 1``; ``gate = sigmoid(gamma)`` (Eq. 6).

        Args:
            prompt: (1 or L, P, D), None for no prompts.
            gamma: (L-1,), None for gates that are 1 (shallow prompts) or 0 (deep prompts).
            tau: (L,), None for temperatures that are 1.
        """
        if prompt is None:
            prompt = torch.zeros(1, 0, width, device=device)
        deep = prompt.shape[0] > 1
        gate = torch.full((depth - 1,), 0.0 if deep else 1.0, device=device) if gamma is None else torch.sigmoid(gamma)
        return cls(
            prompt=prompt[None],
            gate=gate[None],
            tau=(torch.ones(depth, device=device) if tau is None else tau)[None],
            mean_pool=torch.tensor([pool == "mean"], device=device),
        )

    @classmethod
    def of(cls, adapter: Adapter, spec: BackboneSpec, device: torch.device | str) -> "AdapterBatch":
        """A stored adapter's tensors on ``device``, ``A = 1``; it must agree with ``spec``."""
        tensors = (adapter.prompt, adapter.gamma, adapter.tau)
        prompt, gamma, tau = (None if tensor is None else tensor.to(device) for tensor in tensors)
        return cls.single(
            depth=spec.depth, width=spec.width, pool=adapter.pool, prompt=prompt, gamma=gamma, tau=tau, device=device
        )

    @classmethod
    def stack(cls, rows: Sequence["AdapterBatch"]) -> "AdapterBatch":
        """Join single-adapter batches along ``A``, padding prompts to the longest and layers to the deepest."""
        layers = max(row.prompt.shape[1] for row in rows)
        length = max(row.prompt.shape[2] for row in rows)
        device = rows[0].prompt.device
        is_deep = [row.prompt.shape[1] > 1 for row in rows]
        counts = [row.prompt.shape[2] for row in rows]
        return cls(
            prompt=torch.cat([_pad_prompt(row.prompt, layers, length) for row in rows]),
            gate=torch.cat([row.gate for row in rows]),
            tau=torch.cat([row.tau for row in rows]),
            mean_pool=torch.cat([row.mean_pool for row in rows]),
            deep=torch.tensor(is_deep, device=device) if len(set(is_deep)) > 1 else None,
            counts=torch.tensor(counts, device=device) if len(set(counts)) > 1 else None,
        )

    def gather(self, index: Tensor) -> "AdapterBatch":
        """Rows ``index`` (B,) of this batch, so that ``A`` becomes ``B``."""
        return AdapterBatch(
            prompt=self.prompt[index],
            gate=self.gate[index],
            tau=self.tau[index],
            mean_pool=self.mean_pool[index],
            deep=None if self.deep is None else self.deep[index],
            counts=None if self.counts is None else self.counts[index],
        )

    @property
    def prompts(self) -> int:
        """``P``, padding included."""
        return self.prompt.shape[2]

    def valid(self, body: int) -> Tensor | None:
        """(A, S) bool: which of ``body`` prefix and patch rows plus ``P`` prompt rows are real; None when all are."""
        if self.counts is None:
            return None
        position = torch.arange(self.prompts, device=self.prompt.device)
        prompts = position < self.counts[:, None]
        return torch.cat([prompts.new_ones(len(prompts), body), prompts], dim=1)


def _pad_prompt(prompt: Tensor, layers: int, length: int) -> Tensor:
    """(1, 1|L, P, D) -> (1, layers, length, D): zeros fill rows; a shallow adapter never reads layers past 0."""
    padding = (0, 0, 0, length - prompt.shape[2], 0, layers - prompt.shape[1])
    return F.pad(prompt, padding)


def embed(model: Any, images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) to the input tokens of block 0 without prompts, (B, prefix + N, D) (Eq. 1)."""
    tokens: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    return tokens


def attention(attn: Any, x: Tensor, tau: Tensor, mask: Tensor | None) -> Tensor:
    """Multi-head self-attention with scores ``q k^T / (sqrt(d) * tau)`` (Eq. 9).

    Args:
        attn: a timm ``Attention`` module.
        x: (B, S, D), already normalised.
        tau: (A,) temperatures within their range.
        mask: (A, 1, 1, S) bool, which keys may be read; None for all.

    Returns:
        (B, S, D)
    """
    batch, length, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, length, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q = attn.q_norm(q) / tau[:, None, None, None].to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, attn.k_norm(k), v, attn_mask=mask)
    return attn.proj(attn.norm(mixed.transpose(1, 2).reshape(batch, length, attn.attn_dim)))  # type: ignore[no-any-return]


def block(blk: Any, x: Tensor, tau: Tensor, mask: Tensor | None) -> Tensor:
    """One frozen pre-norm transformer block (Eq. 2) on (B, S, D); arguments as in `attention`."""
    x = x + blk.ls1(attention(blk.attn, blk.norm1(x), tau, mask))
    return x + blk.ls2(blk.mlp(blk.norm2(x)))  # type: ignore[no-any-return]


def _gated_prompts(adapter: AdapterBatch, index: int, before: Tensor, after: Tensor) -> Tensor:
    """Prompt rows that block ``index + 1`` reads: ``g*after + (1-g)*z`` (Eq. 7), (B, P, D).

    ``z`` is ``before`` for shallow prompts and the next block's own tokens for deep ones.
    """
    keep = before
    if adapter.prompt.shape[1] > 1:
        fresh = adapter.prompt[:, index + 1]
        keep = fresh if adapter.deep is None else torch.where(adapter.deep[:, None, None], fresh, before)
    gate = adapter.gate[:, index, None, None]
    return gate * after + (1 - gate) * keep


def final_norm(model: Any) -> nn.Module:
    """The backbone's own pretrained norm, wherever timm keeps it."""
    norm: nn.Module = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return norm


def pool(x: Tensor, adapter: AdapterBatch, prefix: int) -> Tensor:
    """Weighted sum over the rows of (B, S, D) -> (B, D): CLS, or the mean of patches and prompts."""
    rows = x.shape[1]
    valid = adapter.valid(rows - adapter.prompts)
    mean = x.new_ones(1, rows) if valid is None else valid.to(x.dtype)
    mean = torch.cat([torch.zeros_like(mean[:, :prefix]), mean[:, prefix:]], dim=1)
    cls = F.one_hot(torch.zeros(1, dtype=torch.long, device=x.device), rows).to(x.dtype)
    weights = torch.where(adapter.mean_pool[:, None], mean / mean.sum(dim=1, keepdim=True), cls)
    return torch.matmul(weights[:, None], x)[:, 0]


def prompted_features(model: Any, tokens: Tensor, adapter: AdapterBatch, on_block: OnBlock | None = None) -> Tensor:
    """Run all blocks with prompts, gates and temperatures, then pool, then the backbone's norm.

    Args:
        model: a frozen timm ``VisionTransformer``.
        tokens: (B, prefix + N, D) from `embed`.
        adapter: ``A`` is 1 or ``B``.
        on_block: called as ``on_block(l, x)`` with the (B, S, D) tokens that block ``l`` hands on.

    Returns:
        (B, D) features for the head.
    """
    batch, body, _ = tokens.shape
    valid = adapter.valid(body)
    mask = None if valid is None else valid[:, None, None]
    tau = adapter.tau.clamp(TAU_MIN, TAU_MAX)
    x = tokens
    if adapter.prompts:
        x = torch.cat([x, adapter.prompt[:, 0].to(x.dtype).expand(batch, -1, -1)], dim=1)
    last = len(model.blocks) - 1
    for index, blk in enumerate(model.blocks):
        y = block(blk, x, tau[:, index], mask)
        if adapter.prompts and index < last:
            prompts = _gated_prompts(adapter, index, x[:, body:], y[:, body:])
            y = torch.cat([y[:, :body], prompts.to(y.dtype).expand(batch, -1, -1)], dim=1)
        x = y
        if on_block is not None:
            on_block(index, x)
    features: Tensor = final_norm(model)(pool(x, adapter, model.num_prefix_tokens))
    return features
