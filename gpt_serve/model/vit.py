"""A frozen Vision Transformer as the forward pass sees it: one form for all kinds of timm, made once at load time.

The parts are timm's own modules and parameters, under the names that timm's ``VisionTransformer`` has for them. What
timm writes differently elsewhere (separate projections, biases apart, LayerScale as a bare parameter, rotary tables)
is brought into this form; nothing of the arithmetic changes.

Shapes: batch ``B``, patches ``N``, width ``D``, heads ``H`` of size ``d``.
"""

from typing import Any

import torch
from timm.layers import Attention as PlainAttention
from timm.layers import AttentionPoolLatent, AttentionRope, LayerScale, PatchEmbed
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as PlainBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gpt_serve.errors import UnsupportedBackbone
from gpt_serve.specs import Pool


class Rotation(nn.Module):
    """Rotary position embedding: turns the pairs of each head's numbers by angles that depend on the patch.

    The prefix and whatever follows the patches, prompts among it, stay as they are.

    Attributes:
        prefix: rows before the patches.
        split: whether a pair is a number of a head's first half and one of its second; otherwise they are neighbours.
    """

    sin: Tensor
    cos: Tensor

    def __init__(self, table: Tensor, heads: int, prefix: int, split: bool) -> None:
        """``table``: (N, 2*d), or (H, N, 2*d) where heads differ: sines, then cosines."""
        super().__init__()
        self.heads, self.prefix, self.split = heads, prefix, split
        by_head = table if table.ndim == 3 else table.expand(heads, -1, -1)
        for name, values in zip(("sin", "cos"), by_head.chunk(2, dim=-1), strict=True):
            self.register_buffer(name, values.transpose(0, 1).flatten(1).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, H*d), all patches among the rows -> the same shape."""
        end = self.prefix + len(self.sin)
        patches = x[:, self.prefix : end]
        turned = patches * self.cos + self._quarter_turn(patches) * self.sin
        return torch.cat([x[:, : self.prefix], turned, x[:, end:]], dim=1)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """Each pair ``(a, b)`` as ``(-b, a)``."""
        pairs = x.shape[-1] // (2 * self.heads)
        shape, of_pair = ((self.heads, 2, pairs), -2) if self.split else ((self.heads, pairs, 2), -1)
        a, b = x.reshape(*x.shape[:-1], *shape).unbind(of_pair)
        return torch.stack([-b, a], dim=of_pair).flatten(-3)


class Attention(nn.Module):
    """The parts of a block's self-attention.

    Attributes:
        num_heads: ``H``.
        head_dim: ``d``.
        attn_dim: ``H*d``.
        qkv: queries, keys and values in one linear layer (D -> 3*H*d).
        q_norm: over each head of the queries; so is ``k_norm`` of the keys.
        rotation: of queries and keys after their norms; None for a backbone without rotary embeddings.
        norm: of what attention has mixed, before ``proj``.
    """

    def __init__(self, attn: Any, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.attn_dim = attn.num_heads * attn.head_dim
        self.qkv = _fused(attn)
        self.q_norm, self.k_norm, self.rotation = attn.q_norm, attn.k_norm, rotation
        self.norm, self.proj = attn.norm, attn.proj


class Block(nn.Module):
    """The parts of a pre-norm transformer block; ``ls1`` and ``ls2`` are LayerScale or the identity."""

    def __init__(self, blk: Any, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = blk.norm1, Attention(blk.attn, rotation), _layer_scale(blk, "1")
        self.norm2, self.mlp, self.ls2 = blk.norm2, blk.mlp, _layer_scale(blk, "2")


class ViT(nn.Module):
    """The parts of a Vision Transformer.

    Attributes:
        blocks: ``L`` of `Block`.
        num_prefix_tokens: CLS and registers, which come before the patches.
        no_embed_class: whether position embeddings are of patches alone.
        norm_first: whether the final norm comes before the mean over tokens, not after it.
        attn_pool: the backbone's own attention pooling of normed tokens, (B, N, D) -> (B, D); None without.
        pooled_from: the first row that ``attn_pool`` reads.
    """

    def __init__(self, model: Any) -> None:
        """Of a timm model that `check_supported` lets pass; its modules and parameters are shared, not copied."""
        super().__init__()
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self.patch_embed, self.norm_pre = model.patch_embed, model.norm_pre
        self.blocks = nn.ModuleList(
            Block(blk, rotation) for blk, rotation in zip(model.blocks, _rotations(model), strict=True)
        )
        self.norm, self.fc_norm, self.attn_pool = model.norm, model.fc_norm, model.attn_pool
        self.num_prefix_tokens, self.no_embed_class = model.num_prefix_tokens, model.no_embed_class
        self.norm_first = model.global_pool == "avg" and not isinstance(model.norm, nn.Identity)
        self.pooled_from = 0 if getattr(model, "pool_include_prefix", True) else model.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        """Whether row 0 is a CLS token."""
        return self.cls_token is not None

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The poolings that the backbone has the parts for."""
        own: list[Pool] = ["cls"] if self.has_class_token else []
        return (*own, "mean", "attention") if self.attn_pool is not None else (*own, "mean")

    @property
    def final_norm(self) -> nn.Module:
        """The pretrained norm before the head, wherever timm keeps it."""
        norm: nn.Module = self.fc_norm if isinstance(self.norm, nn.Identity) else self.norm
        return norm

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to the input tokens of block 0, (B, prefix + N, D)."""
        x: Tensor = self.patch_embed(images)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is not None and self.no_embed_class:
            x = x + self.pos_embed
        x = torch.cat([*prefix, x], dim=1)
        if self.pos_embed is not None and not self.no_embed_class:
            x = x + self.pos_embed
        return self.norm_pre(x)  # type: ignore[no-any-return]


def check_supported(model: nn.Module, name: str, *, fixed_size: bool = True) -> None:
    """Raise `UnsupportedBackbone` unless ``model`` is a ViT that the prompted forward pass computes exactly.

    Args:
        fixed_size: whether a model that takes images of any size is refused, too.
    """
    advice = f"backbone {name!r} is not supported: "
    if type(model) not in (VisionTransformer, Eva):
        raise UnsupportedBackbone(
            f"{advice}{type(model).__name__} is not a plain Vision Transformer; choose a timm vit_*, deit3_*, eva02_* "
            "or *_dinov3 model"
        )
    vit: Any = model
    if not all(_is_standard(blk) for blk in vit.blocks):
        raise UnsupportedBackbone(f"{advice}its blocks are not standard pre-norm attention blocks")
    embedding = type(vit.patch_embed) is PatchEmbed and vit.patch_embed.proj.in_channels == 3
    if not embedding or (fixed_size and vit.dynamic_img_size):
        raise UnsupportedBackbone(f"{advice}it needs a fixed-size patch embedding of RGB images")
    if vit.global_pool not in ("token", "avg", "map", "") or not isinstance(vit.attn_pool, AttentionPoolLatent | None):
        raise UnsupportedBackbone(f"{advice}it pools in a way that is not known here")
    if not isinstance(vit.norm, nn.Identity) and not isinstance(vit.fc_norm, nn.Identity):
        raise UnsupportedBackbone(f"{advice}it has a norm before and one after its pooling")


def _is_standard(blk: Any) -> bool:
    """Whether timm's own forward pass of a block is that of `Block`."""
    kinds = {PlainBlock: (PlainAttention,), EvaBlock: (EvaAttention, AttentionRope)}
    attn: Any = getattr(blk, "attn", None)
    if type(attn) not in kinds.get(type(blk), ()) or attn.gate is not None:
        return False
    same_heads: bool = getattr(attn, "num_kv_heads", attn.num_heads) == attn.num_heads
    return same_heads


def _rotations(model: Any) -> list[Rotation | None]:
    """Return the rotary embedding of each block at the model's input size."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return [None] * len(model.blocks)
    with torch.no_grad():
        table = rope.get_embed() if hasattr(rope, "feat_shape") else rope.get_embed(shape=model.patch_embed.grid_size)
    tables = table if model.rope_mixed else [table] * len(model.blocks)
    return [
        Rotation(own, blk.attn.num_heads, model.num_prefix_tokens, blk.attn.rotate_half)
        for own, blk in zip(tables, model.blocks, strict=True)
    ]


def _layer_scale(blk: Any, number: str) -> nn.Module:
    """``ls1`` or ``ls2`` of a plain block; an Eva block has a bare parameter instead."""
    own = getattr(blk, f"ls{number}", None)
    if isinstance(own, nn.Module):
        return own
    gamma = getattr(blk, f"gamma_{number}")
    if gamma is None:
        return nn.Identity()
    scale = LayerScale(len(gamma), device="meta")
    scale.gamma = gamma
    module: nn.Module = scale
    return module


def _fused(attn: Any) -> nn.Linear:
    """The projections to queries, keys and values as one layer; what timm keeps as one is shared."""
    if attn.qkv is not None and getattr(attn, "q_bias", None) is None:
        layer: nn.Linear = attn.qkv
        return layer
    if attn.qkv is not None:
        weight, biases = attn.qkv.weight, [attn.q_bias, attn.k_bias, attn.v_bias]
    else:
        projections = [attn.q_proj, attn.k_proj, attn.v_proj]
        weight = nn.Parameter(torch.cat([layer.weight for layer in projections]), requires_grad=False)
        biases = [layer.bias for layer in projections]
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=any(bias is not None for bias in biases), device="meta")
    fused.weight = weight
    if fused.bias is not None:
        size = weight.shape[0] // 3
        biases = [weight.new_zeros(size) if bias is None else bias.detach() for bias in biases]
        fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return fused
