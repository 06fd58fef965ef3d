"""Weights from files: MAE, MoCo v3 and timm checkpoints, in .safetensors or .pth."""

import math
import re
import textwrap
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from gpt_serve.errors import CheckpointError
from gpt_serve.specs import Family

# The encoder that is published for transfer comes first.
_MOCO_PREFIXES = ("module.base_encoder.", "module.momentum_encoder.")
# What pretraining needs and a frozen encoder does not.
_DROPPED = ("head.", "head_drop.", "decoder", "mask_token", "fc.", "projector.", "predictor.")
_NO_WEIGHTS = "holds no weights: expected a timm, MAE or MoCo v3 state dict"


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], Family | None]:
    """Read the encoder's state dict.

    Returns:
        The tensors by timm's names, and the family (None when unknown): MAE checkpoints have weights under
        ``model`` and no classifier, MoCo v3 ones an encoder of its own under ``state_dict``, and .safetensors files
        may name it in their metadata as ``family``.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no tensors.
    """
    content = _by_name(_read(Path(path)))
    family = _stated_family(Path(path))
    if isinstance(content.get("state_dict"), Mapping):
        content = _by_name(content["state_dict"])
        for prefix in _MOCO_PREFIXES:
            if any(key.startswith(prefix) for key in content):
                content = {key[len(prefix) :]: value for key, value in content.items() if key.startswith(prefix)}
                family = "mocov3"
                break
    elif isinstance(content.get("model"), Mapping):
        content = _by_name(content["model"])
        family = None if any(key.startswith("head.") for key in content) else "mae"
    weights = {
        key: value
        for key, value in content.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not key.startswith(_DROPPED)
    }
    if not weights:
        raise CheckpointError(f"checkpoint {path} {_NO_WEIGHTS}")
    return weights, family


def _stated_family(path: Path) -> Family | None:
    """What the metadata of a readable .safetensors file says."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        stated = (file.metadata() or {}).get("family")
    return next((family for family in get_args(Family) if family == stated), None)


def load_checkpoint(model: VisionTransformer, path: str | Path) -> Family | None:
    """Load the file's weights into ``model``, which takes on the input size of the file's position embeddings.

    Returns:
        The family of the checkpoint, None when unknown.

    Raises:
        CheckpointError: the file cannot be read, or keys or shapes do not fit.
    """
    weights, family = read_checkpoint(path)
    weights = {key: value.float() for key, value in weights.items()}
    if isinstance(model.norm, nn.Identity):
        weights = {_to_fc_norm(key): value for key, value in weights.items()}
    try:
        _take_on_size(model, weights)
        weights = checkpoint_filter_fn(weights, model)
        result = model.load_state_dict(weights, strict=False)
    except Exception as error:  # tensors of any shape meet timm's conversions here
        raise CheckpointError(f"checkpoint {path} does not fit the backbone: {_last_line(error)}") from error
    wrong = [f"missing {key}" for key in result.missing_keys] + [f"unexpected {key}" for key in result.unexpected_keys]
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} does not fit the backbone: {', '.join(wrong[:4])} ({len(wrong)} keys)"
        )
    return family


def _take_on_size(model: VisionTransformer, weights: Mapping[str, Tensor]) -> None:
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


def _by_name(content: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if isinstance(key, str)}


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
