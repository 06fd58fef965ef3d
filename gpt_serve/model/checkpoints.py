"""Weights from files: MAE, MoCo v3 and timm checkpoints, in .safetensors or .pth."""

import math
import re
import textwrap
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as convert_eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as convert_vit
from torch import Tensor, nn

from gpt_serve.errors import CheckpointError
from gpt_serve.specs import Family

# What may lie around an encoder in a checkpoint or in the names of its tensors. Of several encoders the first kind is
# taken before the others, and the last kind only where there is nothing else.
_PREFERRED = ("base_encoder", "teacher", "model_ema", "state_dict_ema")
_WRAPPERS = ("state_dict", "model", "module", "_orig_mod", "backbone", "encoder", "vision_encoder", "visual", "trunk")
_LESSER = ("momentum_encoder", "target_encoder", "student")
_MOST_WRAPPED = 4  # mappings inside mappings; a pickle may hold one that contains itself
# Tensors that every encoder has, by the layouts that timm reads.
_ANCHORS = ("patch_embed.proj.weight", "visual.class_embedding")
# What pretraining needs and a frozen encoder does not. (timm tells DINOv2's layout by its mask token, and drops that.)
_DROPPED = ("head.", "head_drop.", "decoder", "fc.", "projector.", "predictor.")
_NO_WEIGHTS = "holds no weights: expected a timm, MAE or MoCo v3 state dict"
# MoCo v3's own architectures (its vits.py) by width: what its training runs call them, and their attention heads.
_MOCO_V3 = {384: ("vit_small", 12), 768: ("vit_base", 12), 1024: ("vit_large", 16), 1280: ("vit_huge", 16)}


@dataclass(frozen=True)
class Checkpoint:
    """The encoder of a file.

    Attributes:
        path: the file.
        weights: the encoder's tensors, by the names of a layout that timm reads, without wrappers and heads.
        family: the pretraining; None when unknown.
        arguments: what ``timm.create_model`` must be told beside the model's name, because shapes do not show it.
    """

    path: Path
    weights: dict[str, Tensor]
    family: Family | None
    arguments: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read an encoder, whatever lies around it: a training run's other parts, other encoders, ``module.`` and the like.

    The family is what a .safetensors file states as ``family`` in its metadata, or follows from the weights: MoCo v3
    has a ``base_encoder``, MAE a decoder, and both have position embeddings that are computed, each in its own way.

    Raises:
        CheckpointError: the file is missing, unreadable, holds no tensors, or its encoder lies under an unknown name.
    """
    path = Path(path)
    content = _flat(_read(path))
    prefix = _find_prefix(path, content)
    found = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}
    weights = {key: value for key, value in tensors.items() if not key.startswith(_DROPPED)}
    if not weights:
        raise CheckpointError(f"checkpoint {path} {_NO_WEIGHTS}")
    family = _stated_family(path) or _seen_family(prefix, tensors)
    return Checkpoint(path, weights, family, _unshown(content, weights, family))


def _flat(content: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
    """Mappings inside mappings as one, with the names joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Mapping) and depth < _MOST_WRAPPED:
            flat |= {f"{key}.{name}": item for name, item in _flat(value, depth + 1).items()}
        else:
            flat[key] = value
    return flat


def _find_prefix(path: Path, content: Mapping[str, Any]) -> str:
    """What precedes the names of the encoder's tensors."""
    found = [key.removesuffix(anchor) for anchor in _ANCHORS for key in content if f".{key}".endswith(f".{anchor}")]
    known = {*_PREFERRED, *_WRAPPERS, *_LESSER, ""}
    prefixes = [prefix for prefix in found if known.issuperset(prefix.split("."))]
    if found and not prefixes:
        raise CheckpointError(
            f"checkpoint {path} does not fit the backbone: the names of its weights begin with {found[0]!r}, which is "
            "not known here; save these tensors alone, without that prefix"
        )
    return min(prefixes, key=_rank) if prefixes else _common_prefix(content)


def _rank(prefix: str) -> tuple[bool, bool]:
    words = prefix.split(".")
    return any(word in _LESSER for word in words), not any(word in _PREFERRED for word in words)


def _common_prefix(content: Mapping[str, Any]) -> str:
    """The wrapper around most tensors of a layout that only timm knows."""
    tensors = [key for key, value in content.items() if isinstance(value, Tensor)]
    for wrapper in _WRAPPERS[:2]:
        if tensors and all(key.startswith(f"{wrapper}.") for key in tensors):
            return f"{wrapper}."
    return ""


def _unshown(content: Mapping[str, Any], weights: Mapping[str, Tensor], family: Family | None) -> dict[str, Any]:
    """What differs from timm's architectures without a trace in the shapes.

    MoCo v3's ViT-S has 12 heads where timm's has 6. OpenAI's CLIP, told by constants among its tensors, has QuickGELU.
    """
    if "visual.class_embedding" in weights and "input_resolution" in content:
        return {"act_layer": "quick_gelu"}
    width = weights["cls_token"].shape[-1] if "cls_token" in weights else 0
    if family != "mocov3" or width not in _MOCO_V3:
        return {}
    arch, heads = _MOCO_V3[width]
    return {"num_heads": heads} if content.get("arch") in (None, arch) else {}


def _stated_family(path: Path) -> Family | None:
    """What the metadata of a readable .safetensors file says."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        stated = (file.metadata() or {}).get("family")
    return next((family for family in get_args(Family) if family == stated), None)


def _seen_family(prefix: str, tensors: Mapping[str, Tensor]) -> Family | None:
    """What names and position embeddings tell. A classifier means that a model was trained on, as something else."""
    words = prefix.split(".")
    if "base_encoder" in words or "momentum_encoder" in words:
        return "mocov3"
    if "head.weight" in tensors:
        return None
    if any(key.startswith("decoder_blocks.") for key in tensors):
        return "mae"
    table = tensors.get("pos_embed")
    if table is None or "cls_token" not in tensors or table.ndim != 3 or table.shape[-1] % 4:
        return None
    if _is_computed(table[0].float(), columns_first=True):
        return "mae"
    return "mocov3" if _is_computed(table[0].float(), columns_first=False) else None


def _is_computed(table: Tensor, columns_first: bool) -> bool:
    """Whether position embeddings (1 + N, D) are sines and cosines of a square grid's columns and rows, zero for CLS.

    MAE's begin with the columns (``get_2d_sincos_pos_embed``), MoCo v3's with the rows
    (``build_2d_sincos_position_embedding``).
    """
    side, quarter = math.isqrt(len(table) - 1), table.shape[1] // 4
    if side**2 != len(table) - 1 or table[0].any():
        return False
    angles = torch.arange(side)[:, None] / 10000 ** (torch.arange(quarter) / quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    halves = [columns, rows] if columns_first else [rows, columns]
    return torch.allclose(table[1:], torch.cat(halves, dim=1), rtol=0, atol=2e-3)  # half precision has 1/2048


def load_checkpoint(model: VisionTransformer | Eva, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights into ``model``, which takes on the input size of the file's position embeddings.

    Raises:
        CheckpointError: keys or shapes do not fit, or patches or attention heads are not those of the backbone.
    """
    path = checkpoint.path
    weights = {key: value.float() for key, value in checkpoint.weights.items()}
    _check_architecture(model, checkpoint)
    if isinstance(model.norm, nn.Identity):
        weights = {_to_fc_norm(key): value for key, value in weights.items()}
    try:
        _take_on_size(model, weights)
        weights = (convert_eva if isinstance(model, Eva) else convert_vit)(weights, model)
        result = model.load_state_dict(weights, strict=False)
    except Exception as error:  # tensors of any shape meet timm's conversions here
        raise CheckpointError(f"checkpoint {path} does not fit the backbone: {_last_line(error)}") from error
    wrong = [f"missing {key}" for key in result.missing_keys] + [f"unexpected {key}" for key in result.unexpected_keys]
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} does not fit the backbone: {', '.join(wrong[:4])} ({len(wrong)} keys)"
        )


def _check_architecture(model: VisionTransformer | Eva, checkpoint: Checkpoint) -> None:
    """Refuse what would load and compute something else: timm resamples patches, and shapes do not tell heads."""
    refused = f"checkpoint {checkpoint.path} does not fit the backbone: "
    heads = model.blocks[0].attn.num_heads
    if checkpoint.arguments.get("num_heads", heads) != heads:
        raise CheckpointError(f"{refused}it has {checkpoint.arguments['num_heads']} attention heads, not {heads}")
    for key in ("patch_embed.proj.weight", "visual.conv1.weight"):
        weight = checkpoint.weights.get(key)
        own = tuple(model.patch_embed.patch_size)
        if weight is None or weight.ndim != 4 or tuple(weight.shape[2:]) == own:
            continue
        patches = "its patches are {} x {} pixels, the backbone's {} x {}".format(*weight.shape[2:], *own)
        raise CheckpointError(f"{refused}{patches}: choose a backbone with a patch size of {weight.shape[2]}")


def _take_on_size(model: VisionTransformer | Eva, weights: Mapping[str, Tensor]) -> None:
    """Give ``model`` the input that the file's position embeddings are for, so that nothing interpolates them."""
    names = ("pos_embed", "visual.positional_embedding")
    tables = [value for key, value in weights.items() if key in names]
    rows = tables[0].shape[-2] if tables and tables[0].ndim > 1 else 0
    patches = (rows - (0 if model.no_embed_class else model.num_prefix_tokens), rows - 1, rows)
    side = next((math.isqrt(count) for count in patches if count > 0 and math.isqrt(count) ** 2 == count), None)
    if side is not None:
        height, width = model.patch_embed.patch_size
        model.set_input_size(img_size=(side * height, side * width))


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Checkpoints of a training run keep its arguments; a Namespace is plain data.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise whatever the unpickler stumbles over
        raise CheckpointError(
            f"checkpoint {path} cannot be read as .safetensors or as a weights-only .pth: {_reason(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path} {_NO_WEIGHTS}")
    return content


def _to_fc_norm(key: str) -> str:
    """Models that pool before the norm keep the same weights under another name."""
    return f"fc_{key}" if key.startswith("norm.") else key


def _reason(error: Exception) -> str:
    """Why a file cannot be read; of a refused pickle, torch's own text ends with advice to trust the file."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is not None:
        return f"it holds a Python object ({refused[1][:80]}), which could run code; save the state dict alone"
    detail = "" if isinstance(error, UnpicklingError) else f" ({_last_line(error)})"
    return f"it is damaged or in another format{detail}"


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[-1], 200, placeholder=" ...") if lines else type(error).__name__
