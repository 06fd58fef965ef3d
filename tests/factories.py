"""Adapters with random weights for any backbone, in memory and without training."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.adapters.unknown import Unknown
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import BackboneSpec, CropMode, Tap
from tests.tiny_vit import PREPROCESS, random_tensors

TINY_SPEC = BackboneSpec(name="tiny", fingerprint="ab" * 32, depth=3, width=16, pool="mean", preprocess=PREPROCESS)
"""A backbone that exists only as numbers: enough for files and stores."""


def make_adapter(
    spec: BackboneSpec = TINY_SPEC,
    task: str = "alpha",
    *,
    method: str = "gated",
    deep: bool = False,
    prompts: int = 3,
    classes: int = 4,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    **fields: Any,
) -> Adapter:
    """A valid adapter of ``spec``, decided by its arguments.

    Args:
        method: one of `tests.tiny_vit.METHODS`; decides which tensors there are.
        deep: gated prompts for every block instead of the first.
        labels: class names; by default ``class-0``, ``class-1``, ... of which there are ``classes``.
        fields: any other field of `Adapter`, put in place as it is: valid or not.
    """
    names = tuple(labels) if labels is not None else tuple(f"class-{index}" for index in range(classes))
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(
        task=task,
        method=method,
        backbone=spec.name,
        backbone_sha256=spec.fingerprint,
        labels=names,
        pool=spec.pool,
        preprocess=spec.preprocess,
        training={"seed": seed, "metrics": {"val_accuracy": 0.75}},
        created="2026-01-02T03:04:05Z",
        head_weight=torch.randn(len(names), spec.width, generator=generator),
        head_bias=torch.randn(len(names), generator=generator),
        **random_tensors(f"{method}-deep" if deep else method, spec.depth, spec.width, prompts=prompts, seed=seed),
    )
    return dataclasses.replace(adapter, **fields)


def make_unknown(width: int, *, seed: int = 0, knots: int = 20) -> Unknown:
    """What tells strangers of features (width,): random, with distances from about ``width`` on as knots."""
    generator = torch.Generator().manual_seed(200 + seed)
    scale = 1 + torch.rand(width, generator=generator)
    basis = 0.2 * torch.randn(3, width, generator=generator)
    return Unknown(torch.randn(width, generator=generator), scale, basis, width * torch.linspace(0.5, 6, knots))


CHANNELS = 5
"""Of the decoder of `make_segmenter`."""


def make_segmenter(
    spec: BackboneSpec = TINY_SPEC,
    task: str = "roads",
    *,
    decoder: bool = False,
    mode: CropMode = "squash",
    classes: int = 4,
    seed: int = 0,
    **arguments: Any,
) -> Adapter:
    """A valid segmentation adapter of ``spec``: a linear head for each patch, or a small SETR-PUP decoder.

    Args:
        mode: how images are covered.
        arguments: of `make_adapter`.
    """
    generator = torch.Generator().manual_seed(100 + seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / math.prod(shape[1:]) ** 0.5

    tensors = {"head.norm.weight": 1 + noise(spec.width), "head.norm.bias": noise(spec.width)}
    for number in range(1, 5):
        read = spec.width if number == 1 else CHANNELS
        tensors[f"head.conv{number}.weight"] = 2 * noise(CHANNELS, read, 3, 3)
        tensors[f"head.conv{number}.bias"] = 0.1 * noise(CHANNELS)
    fields: dict[str, Any] = {
        "kind": "segmentation",
        "ignore": (255,),
        "preprocess": dataclasses.replace(spec.preprocess, crop_mode=mode),
        "taps": (Tap(spec.depth - 1, "raw" if decoder else "grid"),),
    }
    if decoder:
        fields |= {"decoder": tensors, "head_weight": noise(classes, CHANNELS)}
    return make_adapter(spec, task, classes=classes, seed=seed, **fields | arguments)


def remove_adapter(store: AdapterStore, task: str) -> None:
    """As a user removes a task: with its folder."""
    shutil.rmtree(store.root / task)


def make_engine(backbone: Backbone, root: Path, tasks: Sequence[str], **options: Any) -> Engine:
    """An engine, made with ``options``, that has an adapter of its own for each of ``tasks``, stored in ``root``."""
    store = AdapterStore(root, backbone.spec)
    for seed, task in enumerate(tasks):
        store.publish(make_adapter(backbone.spec, task, seed=seed))
    return Engine(backbone, store, **options)
