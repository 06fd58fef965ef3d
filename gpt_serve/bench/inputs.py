"""Adapters and images of ordinary shape, without training or downloads. Their values do not change the timings."""

import io
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.methods.prompts import find_method

CLASSES = 20
PHOTO_SIZE = (500, 375)  # width, height: what image folders hold


def untrained_adapter(backbone: Backbone, task: str, method: str, prompts: int) -> Adapter:
    """An adapter with random prompts and head, and with gates and temperatures as they are before training.

    Args:
        method: as ``gpt-serve train --method``.
        prompts: ``P``; nothing to ``linear``, which has none.
    """
    kind, spec = find_method(method), backbone.spec
    tensors: dict[str, Any] = {}
    if kind.prompts:
        tensors["prompt"] = 0.1 * torch.randn(spec.depth if kind.deep else 1, prompts, spec.width)
    if kind.gated:
        tensors["gamma"] = torch.full((spec.depth - 1,), -1.0)
    if kind.tempered:
        tensors["tau"] = torch.ones(spec.depth)
    return Adapter(
        task=task,
        method=method,
        backbone=backbone.name,
        backbone_sha256=backbone.fingerprint,
        labels=tuple(f"class-{index}" for index in range(CLASSES)),
        pool=spec.pool,
        preprocess=spec.preprocess,
        training={},
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        head_weight=0.02 * torch.randn(CLASSES, spec.width),
        head_bias=torch.zeros(CLASSES),
        **tensors,
    )


def photo(seed: int, size: tuple[int, int] = PHOTO_SIZE) -> bytes:
    """A JPEG file with the spectrum of a photograph: octaves of noise, each weaker than the next coarser."""
    generator = np.random.default_rng(seed)
    width, height = size
    pixels = np.full((height, width, 3), 128.0)
    for octave in range(1, 10):
        cells = generator.integers(0, 256, (3 * 2**octave // 4 + 1, 2**octave, 3), dtype=np.uint8)
        scaled = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(scaled, dtype=np.float64) - 128) / 1.7 ** (octave - 1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
