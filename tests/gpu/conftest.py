"""What holds on a GPU as on the CPU: ``make gpu`` runs these tests alone, on a machine with few packages.

They use CUDA where there is some. On the CPU, where they are part of the suite, what only a GPU has is stood in for.
Nothing here may import what ``tests/test_gpu_alone.py`` does not allow.
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.model.backbone import Backbone
from tests.factories import make_adapter
from tests.tiny_vit import METHODS, tiny_backbone


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def exact() -> Iterator[None]:
    """Without TF32, which rounds factors to 10 bits; convolutions take it by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def backbone_on(device: str) -> Backbone:
    """A backbone without the crop: an image of the input size is only normalised.

    Where there is a GPU it is the smaller bundled one; elsewhere one of random weights, which is ten times as fast.
    """
    name = "mae-vit-tiny-32"
    backbone = Backbone.load(name, device=device) if torch.cuda.is_available() else tiny_backbone()
    spec = replace(backbone.spec, preprocess=replace(backbone.spec.preprocess, crop_pct=1.0))
    return Backbone(backbone.model, spec, device)


@pytest.fixture(scope="session")
def backbone(device: str) -> Backbone:
    return backbone_on(device)


@pytest.fixture(scope="session")
def adapters(backbone: Backbone) -> list[Adapter]:
    """Of every method, pooling and gate, each with its own numbers of prompts and classes."""
    made = [
        make_adapter(
            backbone.spec, f"{method}-{pool}", method=method, pool=pool, prompts=1 + 3 * n, classes=2 + 5 * n, seed=n
        )
        for n, (method, pool) in enumerate((method, pool) for method in METHODS for pool in ("cls", "mean"))
    ]
    closed = make_adapter(backbone.spec, "closed", prompts=9, gamma=torch.full((backbone.spec.depth - 1,), -torch.inf))
    # Random heads as they are would make every answer certain.
    return [replace(adapter, head_weight=0.1 * adapter.head_weight) for adapter in [*made, closed]]


@pytest.fixture(scope="session")
def store(adapters: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    return stored(tmp_path_factory.mktemp("adapters"), adapters)


def stored(folder: Path, adapters: list[Adapter]) -> AdapterStore:
    store = AdapterStore(folder)
    for adapter in adapters:
        store.publish(adapter)
    return store


def pixels(backbone: Backbone, seed: int) -> Tensor:
    """uint8 (3, H, W) of the input size."""
    size = backbone.spec.preprocess.input_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


def png(backbone: Backbone, seed: int) -> bytes:
    """`pixels` as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels(backbone, seed).permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
