"""Tiny Vision Transformers with random weights, and random adapters for them."""

from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Pool, Preprocess

SIDE = 16
PREPROCESS = Preprocess(
    input_size=(SIDE, SIDE),
    crop_pct=1.0,
    crop_mode="center",
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def tiny_vit(**options: Any) -> VisionTransformer:
    """A seeded ViT of width 24 whose weights are large enough for every part of it to matter.

    timm's own initialisation (std 0.02) leaves attention nearly uniform: a wrong temperature would not show.
    """
    return _seeded(VisionTransformer, options)


def _seeded(architecture: type[Any], options: dict[str, Any]) -> Any:
    defaults = {"img_size": SIDE, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some biases keep the layers' own random initialisation
        model = architecture(**defaults | options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:  # biases, norms and LayerScale keep their centre
                weight.add_(0.2 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)
    return model


def tiny_backbone(pool: Pool = "mean", **options: Any) -> Backbone:
    """`tiny_vit` as a backbone named ``tiny``."""
    return Backbone.from_model(tiny_vit(**options), "tiny", PREPROCESS, pool)


_ROTARY = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
_DINOV3 = {
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "num_reg_tokens": 4,
    "init_values": 0.5,
    "qkv_bias": False,
}
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dinov3": (Eva, _DINOV3 | {"use_fc_norm": False}),
    "dinov3, CLS": (Eva, _DINOV3 | {"global_pool": "token"}),
    "dinov3, plain biases": (Eva, _DINOV3 | {"qkv_bias": True, "attn_type": "rope"}),
    "eva02": (Eva, _ROTARY | {"swiglu_mlp": True}),
    "eva02, larger": (Eva, _ROTARY | {"swiglu_mlp": True, "qkv_fused": False, "scale_mlp": True}),
    "eva02, clip": (Eva, _ROTARY | {"scale_attn_inner": True, "global_pool": "token"}),
    "eva": (Eva, {}),
    "rotations by head": (Eva, {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope"}),
    "perception encoder": (Eva, _ROTARY | {"use_pre_transformer_norm": True, "global_pool": "map"}),
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "siglip, gap": (VisionTransformer, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "clip": (VisionTransformer, {"pre_norm": True, "act_layer": "quick_gelu"}),
}
"""What timm writes otherwise than its plain ViT, or pools otherwise, by the models that have it."""


def tiny_kind(name: str) -> Backbone:
    """A backbone of `KINDS`, as small as `tiny_vit`, with the pooling that timm has for it."""
    model = _seeded(*KINDS[name])
    pools: dict[str, Pool] = {"token": "cls", "avg": "mean", "map": "attention"}
    return Backbone.from_model(model, name, PREPROCESS, pools[model.global_pool])


def random_images(count: int, side: int = SIDE, seed: int = 1) -> Tensor:
    """Normalised images, (count, 3, side, side)."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


METHODS = ("linear", "vpt-shallow", "vpt-deep", "gated", "gated-hard", "gated-deep")


def random_tensors(
    method: str, depth: int, width: int, *, prompts: int = 5, seed: int = 2, first_block: int = 0
) -> dict[str, Any]:
    """``prompt``, ``gamma`` and ``tau`` of an adapter, without those that ``method`` does not learn.

    With ``first_block``, the block that prompts enter, that one, too.
    """
    depth -= first_block
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {"first_block": first_block} if first_block else {}
    if method != "linear":
        layers = depth if method.endswith("deep") else 1
        tensors["prompt"] = torch.randn(layers, prompts, width, generator=generator)
    if method.startswith("gated"):
        tensors["gamma"] = 2 * torch.randn(depth - 1, generator=generator)
        tensors["tau"] = 0.5 + 2 * torch.rand(depth + first_block, generator=generator)
    if method == "gated-hard":
        tensors["gamma"] = torch.tensor([float("inf"), float("-inf")]).repeat(depth)[: depth - 1]
    return tensors
