"""Plain data that every layer shares: no torch, no disk, no device."""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpt_serve.errors import InvalidTaskName

DEFAULT_TOP_K = 5
"""How many classes an answer lists where nobody asks for a number."""
TASK_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

Pool = Literal["cls", "mean", "attention"]
Family = Literal["mae", "mocov3"]
CropMode = Literal["center", "squash", "pad", "windows"]
Kind = Literal["classification", "segmentation"]
Interpolation = Literal["bilinear", "bicubic"]
Precision = Literal["fp32", "bf16"]
TapPool = Literal["cls", "mean", "patches", "attention", "grid", "raw"]
POOLED: tuple[TapPool, ...] = ("cls", "mean", "patches", "attention")
OF_PATCHES: tuple[TapPool, ...] = ("grid", "raw")
"""What taps of every patch are called: heads that answer with masks read these, and no others do."""


@dataclass(frozen=True)
class Tap:
    """Features that a head reads: the tokens after one block, pooled, then given to the backbone's own norm.

    Attributes:
        block: counted from 0.
        pool: ``cls`` for the CLS token (D,), ``patches`` for the mean of the patch tokens (D,), ``mean`` for the mean
            of patch and prompt tokens (D,), after the last block only; ``attention`` for the backbone's own attention
            pooling of the patch tokens (D,); ``grid`` for every patch token (N, D), and
            ``raw`` for these without the norm.
    """

    block: int
    pool: TapPool


def check_task_name(task: str) -> str:
    """Return ``task`` if it is a valid task name, else raise `InvalidTaskName`."""
    if not TASK_PATTERN.fullmatch(task):
        shown = task if len(task) <= 64 else task[:61] + "..."
        raise InvalidTaskName(
            f"task name {shown!r} is not allowed: use 1 to 64 of a-z 0-9 . _ - and start with a letter or digit"
        )
    return task


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the backbone's input.

    ``center`` scales the shorter side to ``floor(side / crop_pct)`` and crops the centre (timm's
    evaluation transform); ``squash`` scales both sides to ``input_size`` and ignores ``crop_pct``. Two more lose no
    border and keep the aspect ratio, for masks (`gpt_serve.images.masks`): ``pad`` scales the longer side to
    ``input_size`` and fills up the rest, and ``windows`` scales the shorter side to ``side / crop_pct`` and covers the
    image with inputs that overlap.

    Attributes:
        input_size: (height, width) in pixels.
        crop_pct: share of the scaled image's shorter side that one input covers, in (0, 1].
        crop_mode: ``center``, ``squash``, ``pad`` or ``windows``.
        interpolation: ``bilinear`` or ``bicubic``, always antialiased.
        mean: per RGB channel, for pixel values in [0, 1].
        std: per RGB channel, for pixel values in [0, 1].
        exif: whether the EXIF orientation is applied before anything else.
    """

    input_size: tuple[int, int]
    crop_pct: float
    crop_mode: CropMode
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The JSON object stored in an adapter's metadata."""
        return asdict(self)


@dataclass(frozen=True)
class BackboneSpec:
    """What an adapter must agree with.

    Attributes:
        name: timm name or bundled name.
        fingerprint: SHA-256 (hex) of the frozen weights before their position embeddings are interpolated to the input.
        depth: number of blocks ``L``.
        width: embedding dimension ``D``.
        pool: the pooling that the pretraining calls for.
        preprocess: the evaluation preprocessing; its ``input_size`` is the only one the backbone takes.
        resized_fingerprint: of the weights after the interpolation, which older adapters carry; it may differ between
            processors. None where it is not known.
        pools: the poolings that the backbone has the parts for.
    """

    name: str
    fingerprint: str
    depth: int
    width: int
    pool: Pool
    preprocess: Preprocess
    resized_fingerprint: str | None = None
    pools: tuple[Pool, ...] = ("cls", "mean")

    def fits(self, fingerprint: str, input_size: tuple[int, int]) -> bool:
        """Whether what was made on a backbone with this fingerprint and input size works on this one."""
        weights = fingerprint in (self.fingerprint, self.resized_fingerprint)
        return weights and input_size == self.preprocess.input_size

    def told_from(self, name: str, fingerprint: str, input_size: tuple[int, int]) -> str:
        """How this backbone differs from one that does not fit, and what to do: the end of a refusal."""
        same = name == self.name or fingerprint == self.fingerprint
        if not same or input_size == self.preprocess.input_size:
            return f"{name} ({fingerprint[:12]}), not on {self.name} ({self.fingerprint[:12]}): load that backbone"
        own, other = ("{} x {}".format(*size) for size in (self.preprocess.input_size, input_size))
        return f"{name} at {other} pixels, not at {own}: load it with --input-size {input_size[0]}"
