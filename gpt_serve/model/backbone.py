"""A frozen timm Vision Transformer: weights, fingerprint and preprocessing."""

import hashlib
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from gpt_serve.errors import BackboneError, UnsupportedBackbone
from gpt_serve.model.catalog import BUNDLED, DEFAULT_BACKBONE, IMAGENET_MEAN, IMAGENET_STD, Bundled, known_names
from gpt_serve.model.checkpoints import load_checkpoint, read_checkpoint
from gpt_serve.model.hub import offline_without_answer
from gpt_serve.model.vit import ViT, check_supported
from gpt_serve.specs import BackboneSpec, Family, Pool, Preprocess

POOL_OF: dict[Family, Pool] = {"mae": "mean", "mocov3": "cls"}
_POOLED_BY: dict[Pool, str] = {"cls": "CLS token", "mean": "patches", "attention": "attention pooling of its own"}


Module = TypeVar("Module", bound=nn.Module)


class Backbone:
    """A frozen Vision Transformer in eval mode on one device.

    Attributes:
        name: timm name or bundled name.
        model: what the prompted forward pass runs.
        timm_model: the timm model that it was made of, without a classifier; None for a copy of another backbone. Their
            weights are shared, as far as both have them in the same form.
        spec: what adapters must agree with (fingerprint, depth, width, pooling, preprocessing).
        device: where the weights live.
        family: the pretraining, where published recipes know it; None for others.
    """

    def __init__(
        self,
        model: ViT,
        spec: BackboneSpec,
        device: str,
        family: Family | None = None,
        timm_model: nn.Module | None = None,
    ) -> None:
        self.name = spec.name
        self.fingerprint = spec.fingerprint
        self.spec = spec
        self.model = _move(model, device)
        self.timm_model: Any = None if timm_model is None else _move(timm_model, device)
        self.device = torch.device(device)
        self.family = family

    def cast(self, dtype: torch.dtype) -> None:
        """Keep weights and compute activations in ``dtype``; the fingerprint stays that of the float32 weights."""
        self.model.to(dtype)
        if self.timm_model is not None:
            self.timm_model.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which activations are computed."""
        dtype: torch.dtype = self.model.patch_embed.proj.weight.dtype
        return dtype

    @classmethod
    def load(
        cls,
        name: str,
        *,
        checkpoint: str | Path | None = None,
        input_size: int | None = None,
        pool: Pool | None = None,
        device: str = "cpu",
        pretrained: bool = True,
    ) -> "Backbone":
        """Load a bundled backbone or a Vision Transformer of timm.

        Args:
            name: a name of `gpt_serve.model.catalog.BUNDLED`, or a timm model such as ``vit_base_patch16_224.mae``.
            checkpoint: weights from a file (MAE, MoCo v3 or a timm state dict) instead of the bundled or the hub's.
            input_size: side of the square input in pixels; position embeddings are interpolated to it.
            pool: ``cls``, ``mean`` or ``attention`` (the backbone's own); None picks what the pretraining calls for.
            pretrained: False leaves the weights of a timm model random (tests and benchmarks).

        Raises:
            UnsupportedBackbone: the name is unknown or no plain ViT.
            CheckpointError: the file cannot be read or does not fit.
            BackboneError: the weights cannot be downloaded, or the patches do not tile the input.
        """
        if name in BUNDLED:
            return cls._load_bundled(BUNDLED[name], checkpoint, input_size, pool, device)
        _check_name(name, input_size)
        file = None if checkpoint is None else read_checkpoint(checkpoint)
        model = _create(name, pretrained=pretrained and file is None, **({} if file is None else file.arguments))
        size = (input_size, input_size) if input_size is not None else model.patch_embed.img_size
        preprocess = _preprocess(resolve_data_config({}, pretrained_cfg=model.pretrained_cfg), size)
        family: Family | None = "mae" if "mae" in name.rpartition(".")[2].split("_") else None
        if file is not None:
            load_checkpoint(model, file)
            family = file.family or family
        if family is not None:  # timm's plain names have the mean and standard deviation of Google's weights
            preprocess = replace(preprocess, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        pool = pool or (default_pool(model) if family is None else POOL_OF[family])
        return cls.from_model(model, name, preprocess, pool, input_size=size, device=device, family=family)

    @classmethod
    def _load_bundled(
        cls,
        bundled: Bundled,
        checkpoint: str | Path | None,
        input_size: int | None,
        pool: Pool | None,
        device: str,
    ) -> "Backbone":
        _check_input_size(bundled.name, input_size, bundled.patch)
        file = read_checkpoint(checkpoint or bundled.weights)
        model = create_bundled(bundled, **file.arguments)
        load_checkpoint(model, file)
        family = file.family or bundled.family
        size = (input_size, input_size) if input_size is not None else bundled.preprocess.input_size
        pool = pool or (bundled.pool if family is None else POOL_OF[family])
        return cls.from_model(
            model, bundled.name, bundled.preprocess, pool, input_size=size, device=device, family=family
        )

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        name: str,
        preprocess: Preprocess,
        pool: Pool,
        *,
        input_size: tuple[int, int] | None = None,
        device: str = "cpu",
        family: Family | None = None,
    ) -> "Backbone":
        """Freeze ``model`` and take it as a backbone.

        Args:
            preprocess: how images become input; its ``input_size`` does not count.
            input_size: (height, width) that the position embeddings are interpolated to once the fingerprint is taken;
                None for the model's own.

        Raises:
            UnsupportedBackbone: the forward pass does not compute this kind of model, or it has no such pooling.
        """
        check_supported(model, name)
        timm_model: Any = model.requires_grad_(False).eval()
        size = input_size or tuple(timm_model.patch_embed.img_size)
        own, resized = _resize(timm_model, size)
        vit = ViT(timm_model).eval()
        if pool not in vit.pools:
            raise UnsupportedBackbone(f"backbone {name!r} has no {_POOLED_BY[pool]}: use --pool {vit.pools[-1]}")
        spec = BackboneSpec(
            name=name,
            fingerprint=own,
            depth=len(vit.blocks),
            width=timm_model.embed_dim,
            pool=pool,
            pools=vit.pools,
            preprocess=replace(preprocess, input_size=size),
            resized_fingerprint=resized,
        )
        return cls(vit, spec, device, family, timm_model)


def create_bundled(bundled: Bundled, **arguments: Any) -> Any:
    """The architecture of a bundled backbone at its default input size, with random weights."""
    size = bundled.preprocess.input_size
    return timm.create_model(bundled.architecture, img_size=size, num_classes=0, **bundled.arguments, **arguments)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) over the names, shapes and float32 values of all weights, in name order."""
    return _updated(hashlib.sha256(), sorted(model.state_dict().items())).hexdigest()


def _resize(model: Any, size: tuple[int, int]) -> tuple[str, str]:
    """Interpolate the position embeddings to an input of ``size``; the fingerprints before and after.

    What precedes ``pos_embed`` in name order, nearly everything, stays as it is and is hashed once.
    """
    state = sorted(model.state_dict().items())
    first = next((index for index, (key, _) in enumerate(state) if key >= "pos_embed"), len(state))
    common = _updated(hashlib.sha256(), state[:first])
    before = _updated(common.copy(), state[first:]).hexdigest()
    if size == tuple(model.patch_embed.img_size):
        return before, before
    model.set_input_size(img_size=size)
    return before, _updated(common, sorted(model.state_dict().items())[first:]).hexdigest()


def _updated(digest: "hashlib._Hash", state: Iterable[tuple[str, Tensor]]) -> "hashlib._Hash":
    for key, tensor in state:
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest


def _move(model: Module, device: str) -> Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that a driver is there
        raise BackboneError(f"device {device!r} cannot be used here: use cpu or auto ({_first_line(error)})") from error


def _check_name(name: str, input_size: int | None) -> None:
    """Refuse what is not a plain ViT, or not at this size, before any weights are made or downloaded."""
    if not timm.is_model(name):
        raise UnsupportedBackbone(f"unknown backbone {name!r}: use {known_names()} or a timm model name")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
    except RuntimeError as error:  # no such tag after the dot
        raise UnsupportedBackbone(
            f"unknown backbone {name!r}: use {known_names()} or a timm model name ({_first_line(error)})"
        ) from error
    check_supported(model, name, fixed_size=False)
    _check_input_size(name, input_size, max(model.patch_embed.patch_size))


def _check_input_size(name: str, input_size: int | None, patch: int) -> None:
    """timm would silently ignore the pixels that fill no patch."""
    if input_size is not None and (input_size < 1 or input_size % patch):
        raise BackboneError(
            f"input size {input_size} is not a multiple of the {patch}-pixel patches of backbone {name!r}: "
            f"use {max(1, round(input_size / patch)) * patch}"
        )


def _create(name: str, *, pretrained: bool, **arguments: Any) -> Any:
    """The timm model at its own input size, so that its position embeddings are those that were published."""
    try:
        with offline_without_answer() if pretrained else nullcontext():
            return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=False, **arguments)
    except Exception as error:  # timm and the hub raise whatever their HTTP stack raises
        if not pretrained:
            raise BackboneError(f"backbone {name!r} cannot be built: {_first_line(error)}") from error
        raise BackboneError(
            f"weights of {name!r} cannot be had from the hub; pass --checkpoint FILE or use --backbone "
            f"{DEFAULT_BACKBONE} ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    """The start of someone else's message."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 160, placeholder=" ...") if lines else type(error).__name__


def _preprocess(config: Mapping[str, Any], size: tuple[int, int]) -> Preprocess:
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return Preprocess(
        input_size=size,
        crop_pct=float(config["crop_pct"]),
        crop_mode="squash" if config.get("crop_mode") == "squash" else "center",
        interpolation=interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def default_pool(model: Any) -> Pool:
    """timm's."""
    if model.attn_pool is not None:
        return "attention"
    return "cls" if model.cls_token is not None and model.global_pool == "token" else "mean"
