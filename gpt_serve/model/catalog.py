"""The backbones that ship with the package, as plain data: reading this table loads neither torch nor weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from gpt_serve.specs import Family, Pool, Preprocess

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Bundled:
    """A backbone whose weights are package data, in ``gpt_serve/backbones/<name>.safetensors``.

    Attributes:
        name: what ``--backbone`` takes.
        architecture: the timm model that the weights belong to.
        arguments: of ``timm.create_model``, where they differ from that model's own.
        patch: side of a patch in pixels.
        preprocess: how images become input; its ``input_size`` is the default one.
        pool: the pooling that the pretraining calls for.
        family: the pretraining, where published recipes know it.
    """

    name: str
    architecture: str
    patch: int
    preprocess: Preprocess
    pool: Pool
    family: Family | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The file that ships."""
        return Path(str(files("gpt_serve"))) / "backbones" / f"{self.name}.safetensors"


def _imagenet(side: int) -> Preprocess:
    """What both were pretrained with: ImageNet's mean and standard deviation, bicubic, a centre crop of 7/8."""
    return Preprocess(
        input_size=(side, side),
        crop_pct=0.875,
        crop_mode="center",
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


TINY = Bundled(
    name="mae-vit-tiny-32",
    architecture="vit_tiny_patch16_224",
    arguments={"patch_size": 4},
    patch=4,
    preprocess=_imagenet(32),
    pool="mean",
    family="mae",
)
SMALL = Bundled(
    name="vit-small-14",
    architecture="vit_small_patch14_dinov2",
    patch=14,
    preprocess=_imagenet(126),
    pool="cls",
)

BUNDLED = {backbone.name: backbone for backbone in (TINY, SMALL)}
"""The bundled backbones by their names."""

DEFAULT_BACKBONE = os.environ.get("GPT_SERVE_BACKBONE") or SMALL.name
"""What commands use when ``--backbone`` is not given: what the environment names, or the one for photographs."""


def known_names() -> str:
    """The bundled names as advice for a message: ``'a', 'b'``."""
    return ", ".join(repr(name) for name in BUNDLED)
