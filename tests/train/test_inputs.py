"""What frozen blocks give is computed once and kept: the same training, for less work."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import Trunk, embed, run_trunk, tapped_features
from gpt_serve.specs import Tap
from gpt_serve.train import inputs as inputs_module
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.inputs import TrunkInputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.recipes.recipe import Recipe, make_recipe
from tests.factories import make_adapter
from tests.tiny_vit import PREPROCESS, random_images, random_tensors, tiny_backbone
from tests.train.conftest import Recorder

ROW = 4 * (17 * 24 + 24)  # bytes of an image: its tokens and one tap
TAPS = (Tap(0, "cls"), Tap(2, "cls"))


def late(**settings: Any) -> Recipe:
    common: dict[str, Any] = {"method": "gated+shift", "prompts": 3, "epochs": 4, "batch_size": 8, "first_block": 1}
    return make_recipe("adamw", **common | {"taps": "2:cls,0:cls", "views": 2} | settings)


def trained(backbone: Backbone, data: Path, adapters: Path, recipe: Recipe, cache_bytes: int) -> dict[str, Tensor]:
    job = TrainingJob("late", str(data), adapters, recipe, cache_bytes=cache_bytes)
    train_adapter(backbone, job, Recorder(), World())
    adapter = AdapterStore(adapters).load("late").adapter
    names = ("prompt", "gamma", "tau", "shift", "head_weight", "head_bias")
    return {name: value for name in names if (value := getattr(adapter, name)) is not None}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each run of a trunk computed."""
    counts: list[int] = []

    def count(model: Any, tokens: Tensor, *rest: Any) -> Trunk:
        counts.append(len(tokens))
        return run_trunk(model, tokens, *rest)

    monkeypatch.setattr(inputs_module, "run_trunk", count)
    return counts


@pytest.mark.parametrize("start", range(4))
def test_the_pass_goes_on_from_where_the_trunk_ended(start: int) -> None:
    """Taps before and behind, for one adapter and for two tasks of one image."""
    backbone = tiny_backbone(depth=4)
    model, tokens = backbone.model, embed(backbone.model, random_images(3))
    taps = (Tap(3, "cls"), Tap(start, "patches"), Tap(0, "cls"))
    fields = random_tensors("gated-deep", 4, 24, first_block=start) | {"taps": taps, "tau": None}
    batch = AdapterBatch.of(make_adapter(backbone.spec, **fields), backbone.spec, "cpu")
    whole = tapped_features(model, tokens, batch)
    trunk = run_trunk(model, tokens, start, taps)
    assert set(trunk.tapped) == {tap for tap in taps if tap.block < start}
    for one, other in zip(tapped_features(model, trunk, batch), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    shared = dataclasses.replace(batch, images=torch.tensor([0, 0, 2]))
    for one, other in zip(tapped_features(model, trunk, shared), whole, strict=True):
        torch.testing.assert_close(one, other[[0, 0, 2]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_training_with_and_without_the_cache_gives_the_same_weights(
    tiny: Backbone, colours: Path, tmp_path: Path, counted: list[int], augment: str
) -> None:
    kept = trained(tiny, colours, tmp_path / "kept", late(augment=augment), 2**20)
    # 24 training images in each form once, and as they are, 6 validation and 12 test images once.
    assert sum(counted) == (24 if augment == "none" else 3 * 24) + 6 + 12
    counted.clear()
    anew = trained(tiny, colours, tmp_path / "anew", late(augment=augment), 0)
    # Validation images once more for the calibration, and both once more for what tells strangers.
    assert sum(counted) == 4 * (24 + 6) + 6 + 12 + (24 + 6)
    assert kept.keys() == anew.keys() and len(kept) == 6
    for name, value in kept.items():
        torch.testing.assert_close(value, anew[name], atol=1e-5, rtol=0, msg=lambda text, name=name: name + text)


def test_it_is_the_training_that_images_give(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a trunk at all, on the same views."""
    kept = trained(tiny, colours, tmp_path / "kept", late(), 2**20)
    monkeypatch.setattr("gpt_serve.train.methods.prompts.AdapterModule.trunk", 0)
    images = trained(tiny, colours, tmp_path / "images", late(), 2**20)
    for name, value in kept.items():
        torch.testing.assert_close(value, images[name], atol=1e-5, rtol=0, msg=lambda text, name=name: name + text)


def test_what_finds_no_room_is_computed_again(
    tiny: Backbone, colours: Path, tmp_path: Path, counted: list[int]
) -> None:
    kept = trained(tiny, colours, tmp_path / "kept", late(augment="none"), 2**20)
    counted.clear()
    some = trained(tiny, colours, tmp_path / "some", late(augment="none"), 10 * ROW + ROW // 2)
    assert sum(counted) == 24 + 4 * (24 - 10) + 6 * 6 + 12
    for name, value in kept.items():
        torch.testing.assert_close(value, some[name], atol=1e-5, rtol=0)


def test_new_views_in_every_epoch_are_not_kept(
    tiny: Backbone, colours: Path, tmp_path: Path, counted: list[int]
) -> None:
    trained(tiny, colours, tmp_path, late(views=0), 2**20)
    assert sum(counted) == 4 * 24 + 24 + 6 + 12  # and once as they are


def test_views_come_again_and_differ(colours: Path) -> None:
    view = View(open_dataset(str(colours), 0).train, PREPROCESS, None, "crop-flip", 0, variants=3)
    wide = View(view.samples, dataclasses.replace(PREPROCESS, crop_pct=0.5), None, "crop-flip", 0, variants=3)

    def drawn(epoch: int) -> Tensor:
        return torch.stack([wide.drawn("crop-flip", epoch)[index][0] for index in range(8)])

    first, second = drawn(0), drawn(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, drawn(3)) and torch.equal(second, drawn(4))
    assert wide.drawn("none").forms == 1 and wide.drawn("none").drawn("crop").forms == 3


def test_batches_of_kept_and_new_images_are_in_order(tiny: Backbone, colours: Path) -> None:
    view = View(open_dataset(str(colours), 0).train, PREPROCESS, None, "none", 0)
    source = TrunkInputs(tiny, 0, 1, TAPS, 2**20)
    alone = {index: next(source.batches(view, [[index]]))[0] for index in (5, 2)}
    (mixed, targets), (again, _) = list(source.batches(view, [[1, 5, 2, 9], [2, 1]]))
    assert isinstance(mixed, Trunk) and isinstance(again, Trunk)
    assert targets.tolist() == [view.samples[index].target for index in (1, 5, 2, 9)]
    for index, place in ((5, 1), (2, 2)):
        kept = alone[index]
        assert isinstance(kept, Trunk) and torch.equal(mixed.tokens[place], kept.tokens[0])
        assert torch.equal(mixed.tapped[TAPS[0]][place], kept.tapped[TAPS[0]][0])
    assert torch.equal(again.tokens, mixed.tokens[[2, 0]]) and list(mixed.tapped) == [TAPS[0]]


def open_files() -> set[str]:
    return {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")
def test_nothing_stays_in_the_temporary_folder(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    source = TrunkInputs(tiny, 0, 1, TAPS, 2**20)
    view = View(open_dataset(str(colours), 0).train, PREPROCESS, None, "none", 0)
    next(source.batches(view, [[0, 1]]))
    assert not list(folder.iterdir())  # not even while it is used: a killed process leaves nothing
    assert any(name.startswith(str(folder)) for name in open_files())
    del source
    assert not any(name.startswith(str(folder)) for name in open_files())


def test_a_full_disk_is_one_line(tiny: Backbone, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TrunkInputs(tiny, 0, 1, TAPS, 2**20)
    view = View(open_dataset(str(colours), 0).train, PREPROCESS, None, "none", 0)
    with open("/dev/full", "r+b", buffering=0) as full:
        monkeypatch.setattr(source._kept, "file", full)
        with pytest.raises(UsageError, match=rf"{os.strerror(errno.ENOSPC)}: lower --cache-bytes, or name a folder"):
            next(source.batches(view, [[0]]))


def test_a_head_alone_costs_one_pass(tiny: Backbone, colours: Path, tmp_path: Path, counted: list[int]) -> None:
    """Choosing taps, fitting the head twice, scoring and calibrating it: each image once, those of the test, too."""
    job = TrainingJob("colours", str(colours), tmp_path, make_recipe("instant"))
    train_adapter(tiny, job, Recorder(), World())
    assert sum(counted) == 24 + 6 + 12
