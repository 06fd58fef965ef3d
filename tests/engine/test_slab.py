"""Batches gathered from a slab are the adapters that were written, remembered keys and values included."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.engine.slab import MIN_ROWS_PER_SLOT, Packed, Place, Slab, gather
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.heads import read_taps
from gpt_serve.model.prompted import embed, prompted_features, remember, tapped_features
from gpt_serve.specs import Tap
from tests.factories import make_adapter
from tests.tiny_vit import random_images, random_tensors, tiny_backbone

INFINITY = float("inf")


def adapters_of(backbone: Backbone) -> dict[str, Adapter]:
    """One of each kind: closed, open and in between, in either pooling."""
    spec = backbone.spec
    half = torch.tensor([-INFINITY, 0.3])
    return {
        "linear": make_adapter(spec, method="linear", seed=1),
        "open": make_adapter(spec, prompts=4, seed=2),
        "open-cls": make_adapter(spec, prompts=2, seed=3, pool="cls"),
        "closed": make_adapter(spec, prompts=3, seed=4, gamma=torch.full((2,), -INFINITY)),
        "closed-cls": make_adapter(spec, prompts=5, seed=5, gamma=torch.full((2,), -INFINITY), pool="cls"),
        "half": make_adapter(spec, prompts=3, seed=6, gamma=half),
        "deep": make_adapter(spec, method="vpt-deep", prompts=2, seed=7),
        "deep-cls": make_adapter(spec, method="vpt-deep", prompts=4, seed=8, pool="cls", classes=30),
        "deep-half": make_adapter(spec, deep=True, prompts=3, seed=9, gamma=half),
        "deep-open": make_adapter(spec, deep=True, prompts=3, seed=10),
        "linear-cls": make_adapter(spec, method="linear", pool="cls", seed=14),
        "taps": make_adapter(spec, prompts=4, seed=15, gamma=half, **tapped(Tap(1, "patches"), Tap(2, "mean"))),
        "taps-deep": make_adapter(spec, deep=True, prompts=2, seed=16, **tapped(Tap(0, "cls"), Tap(1, "cls"))),
        "shifted": make_adapter(spec, prompts=2, seed=17, shift=random_shift()),
        "late": make_adapter(spec, prompts=3, seed=11, **late("gated", 3)),
        "late-deep": make_adapter(spec, prompts=5, seed=12, **late("vpt-deep", 5)),
        "late-cls": make_adapter(spec, prompts=2, seed=13, pool="cls", **late("vpt-deep", 2)),
        "shifted-linear": make_adapter(spec, method="linear", seed=18, shift=random_shift()),
    }


def tapped(*taps: Tap) -> dict[str, Any]:
    """A head of four classes that reads ``taps``."""
    return {"taps": taps, "head_weight": torch.randn(4, 24 * len(taps), generator=torch.Generator().manual_seed(1))}


def random_shift() -> torch.Tensor:
    return torch.randn(3, 3, 24, generator=torch.Generator().manual_seed(2))


def late(method: str, prompts: int) -> dict[str, Any]:
    """Prompts that enter block 1 of 3."""
    fields = {"prompt": None, "gamma": None, "tau": None}
    return fields | random_tensors(method, 3, 24, prompts=prompts, first_block=1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def place(slab: Slab, backbone: Backbone, adapter: Adapter) -> Place:
    packed = Packed.of(adapter, backbone.spec)
    place = slab.reserve(packed, packed.layout.constant)
    assert place is not None
    slab.write(place, packed)
    if place.layout.remembered:
        slab.write_kv(place, remember(backbone.model, AdapterBatch.of(adapter, backbone.spec, "cpu")))
    return place


@pytest.fixture(scope="module")
def places(backbone: Backbone) -> dict[str, Place]:
    slab = Slab(backbone.spec, 400 * 4 * backbone.spec.width, "cpu")
    return {name: place(slab, backbone, adapter) for name, adapter in adapters_of(backbone).items()}


MIXES: dict[str, list[str]] = {
    "all": [name for name in adapters_of(tiny_backbone()) if "late" not in name],
    "late": ["late", "late-deep", "late-cls"],
    "late, closed alike": ["late-deep", "late-cls"],
    "one, many times": ["closed"] * 3,
    "closed alike": ["closed-cls", "deep-cls", "closed-cls"],
    "closed, shallow and deep, mean": ["closed", "deep", "closed"],
    "half closed": ["half", "deep-half"],
    "half and whole": ["half", "closed", "deep", "deep-half"],
    "deep": ["deep", "deep-cls", "deep-open"],
    "open": ["open", "open-cls", "linear", "open"],
    "without prompts": ["linear", "linear-cls"],
    "without prompts beside closed ones": ["linear", "closed-cls", "deep-cls", "linear-cls"],
    "without prompts beside late ones": ["linear", "late", "late-deep", "linear-cls"],
    "taps": ["taps", "closed-cls", "linear", "taps-deep"],
    "shifts": ["shifted", "linear", "shifted-linear", "taps"],
    "shifts alone": ["shifted", "shifted"],
}


@pytest.mark.parametrize("mix", MIXES)
def test_features_are_those_of_the_adapters_alone(backbone: Backbone, places: dict[str, Place], mix: str) -> None:
    names = MIXES[mix]
    tokens = embed(backbone.model, random_images(len(names)))
    with torch.inference_mode():
        batch = gather([places[name] for name in names])
        tapped = tapped_features(backbone.model, tokens, batch)
        for row, name in enumerate(names):
            alone = AdapterBatch.of(adapters_of(backbone)[name], backbone.spec, "cpu")
            expected = prompted_features(backbone.model, tokens[row : row + 1], alone)
            actual = read_taps(tapped, batch.layout.taps, alone.layout.taps, slice(row, row + 1))
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def remembered(names: Sequence[str], places: dict[str, Place]) -> tuple[int, int]:
    """Blocks that a gathered batch remembers, and layers of prompts that it still gathers."""
    batch = gather([places[name] for name in names])
    return len(batch.kv), batch.prompt.shape[1]


def test_what_all_remember_is_remembered(places: dict[str, Place]) -> None:
    assert remembered(["closed", "deep"], places) == (2, 1)
    assert remembered(["closed-cls", "deep-cls"], places) == (3, 0)
    assert remembered(["half", "closed"], places) == (1, 1)
    assert remembered(["open", "closed"], places) == (0, 1)
    assert remembered(["deep", "open"], places) == (0, 3)
    assert remembered(["late-deep", "late-cls"], places) == (1, 1)
    assert remembered(["late-cls"], places) == (2, 0)
    assert remembered(["late", "late-deep"], places) == (0, 2)


def test_heads(backbone: Backbone, places: dict[str, Place]) -> None:
    for name, adapter in adapters_of(backbone).items():
        weight, bias = places[name].head
        assert torch.equal(weight, adapter.head_weight) and torch.equal(bias, adapter.head_bias)


def test_room_is_used_again(backbone: Backbone) -> None:
    adapter = make_adapter(backbone.spec, prompts=3, classes=4)  # 3 + 4 + 1 rows
    slab = Slab(backbone.spec, (2 * MIN_ROWS_PER_SLOT + 1) * 4 * backbone.spec.width, "cpu")
    first, second = place(slab, backbone, adapter), place(slab, backbone, adapter)
    assert slab.reserve(Packed.of(adapter, backbone.spec), 0) is None
    assert slab.used_bytes == slab.capacity * slab.row_bytes
    slab.free(first)
    slab.free(second)
    assert slab.used_bytes == 0
    again = place(slab, backbone, make_adapter(backbone.spec, prompts=9, classes=5, seed=3))
    assert torch.equal(again.batch.prompt[0], make_adapter(backbone.spec, prompts=9, seed=3).prompt)


def test_slots_run_out_before_rows(backbone: Backbone) -> None:
    slab = Slab(backbone.spec, (MIN_ROWS_PER_SLOT + 1) * 4 * backbone.spec.width, "cpu")
    small = Packed.of(make_adapter(backbone.spec, method="linear", classes=2), backbone.spec)
    held = slab.reserve(small, 0)
    assert held is not None and slab.reserve(small, 0) is None
    slab.free(held)
    assert slab.reserve(small, 0) is not None


def test_rows_in_half_precision(backbone: Backbone) -> None:
    adapter = make_adapter(backbone.spec)
    slab = Slab(backbone.spec, 100 * 2 * backbone.spec.width, "cpu", torch.bfloat16)
    batch = place(slab, backbone, adapter).batch
    assert batch.prompt.dtype == torch.bfloat16 and batch.gate.dtype == torch.float32
    assert torch.equal(batch.prompt[0], adapter.prompt.bfloat16())
