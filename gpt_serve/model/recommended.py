"""Backbones worth trying, as plain data: what ``gpt-serve backbones`` prints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt_serve.model.catalog import BUNDLED, SMALL, TINY
from gpt_serve.specs import Pool


@dataclass(frozen=True)
class Recommended:
    """One backbone.

    Attributes:
        name: what ``--backbone`` takes.
        parameters: in millions.
        licence: of the weights, as an SPDX identifier where there is one.
        input_size: side of the input in pixels where ``--input-size`` is not given.
        pool: what ``--pool`` stands for where it is not given.
        about: pretraining, and what it is good for.
        measured: test accuracy in per cent by data set, of discriminant analysis on frozen features; see
            ``benchmarks/backbones``. Empty where it was not measured by this project.
    """

    name: str
    parameters: float
    licence: str
    input_size: int
    pool: Pool
    about: str
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundled(self) -> bool:
        """Whether the weights ship with the package; the others are downloaded from the Hugging Face hub once."""
        return self.name in BUNDLED

    @property
    def megabytes(self) -> int:
        """Of the weights: bundled ones are float16, those of the hub float32."""
        return round(self.parameters * (2 if self.bundled else 4))

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self) | {"measured": dict(self.measured), "bundled": self.bundled, "megabytes": self.megabytes}


RECOMMENDED = (
    Recommended(
        SMALL.name,
        parameters=22.1,
        licence="MIT AND Apache-2.0",
        input_size=SMALL.preprocess.input_size[0],
        pool=SMALL.pool,
        about="DINOv2, fine-tuned for saliency: photographs",
        measured={"flowers12": 96.7, "caltech101": 67.9},
    ),
    Recommended(
        TINY.name,
        parameters=5.4,
        licence="Apache-2.0",
        input_size=TINY.preprocess.input_size[0],
        pool=TINY.pool,
        about="MAE on Tiny ImageNet: tests and quick trials",
        measured={"flowers12": 73.8, "caltech101": 28.7},
    ),
    Recommended(
        "vit_small_patch14_reg4_dinov2.lvd142m",
        parameters=22.1,
        licence="Apache-2.0",
        input_size=518,
        pool="cls",
        about="DINOv2 with registers; 1,369 patches, with --input-size 224 256",
    ),
    Recommended(
        "vit_base_patch14_reg4_dinov2.lvd142m",
        parameters=86.6,
        licence="Apache-2.0",
        input_size=518,
        pool="cls",
        about="the same, larger",
    ),
    Recommended(
        "vit_small_patch16_dinov3.lvd1689m",
        parameters=21.6,
        licence="DINOv3 License",
        input_size=256,
        pool="mean",
        about="DINOv3; its authors classify by --pool cls",
    ),
    Recommended(
        "vit_base_patch16_dinov3.lvd1689m",
        parameters=85.6,
        licence="DINOv3 License",
        input_size=256,
        pool="mean",
        about="the same, larger",
    ),
    Recommended(
        "vit_base_patch16_siglip_224.v2_webli",
        parameters=92.9,
        licence="Apache-2.0",
        input_size=224,
        pool="attention",
        about="SigLIP 2, trained with captions",
    ),
    Recommended(
        "vit_base_patch16_224.mae",
        parameters=85.8,
        licence="CC-BY-NC-4.0",
        input_size=224,
        pool="mean",
        about="MAE, the paper's backbone: not for commercial use",
    ),
)
