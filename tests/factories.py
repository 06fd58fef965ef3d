"""Adapters with random weights for any backbone, in memory and without training."""

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.specs import BackboneSpec
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


def remove_adapter(store: AdapterStore, task: str) -> None:
    """As a user removes a task: with its folder."""
    shutil.rmtree(store.root / task)
