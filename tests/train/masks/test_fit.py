"""From scenes to a published adapter, and what is measured of it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.evaluate_masks import Protocol, evaluate_masks
from gpt_serve.engine.segment import Segmentation
from gpt_serve.errors import UsageError
from gpt_serve.images.decode import decode
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.masks.fit import train_masks
from gpt_serve.train.masks.recipe import PAPER_EPOCHS, choose_mask_recipe
from gpt_serve.train.masks.samples import NOTHING, label_ids
from gpt_serve.train.masks.score import Confusion
from gpt_serve.train.masks.sources import open_mask_test
from tests.train.conftest import Recorder
from tests.train.masks.conftest import CLASSES, VOID

SMALL = {"epochs": 4, "prompts": 2, "batch_size": 4}


@pytest.fixture(autouse=True, scope="module")
def few_channels() -> Iterator[None]:
    """SETR's 256 would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_serve.train.masks.fit.CHANNELS", 8)
        yield


def train(
    tiny: Backbone,
    scenes: Path,
    adapters: Path,
    recorder: Recorder | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    recipe, _ = choose_mask_recipe("masks", ignore=(VOID,), **SMALL | settings)
    job = TrainingJob("scenes", str(scenes), adapters, recipe, resume=resume)
    summary = train_masks(tiny, job, recorder or Recorder(), World())
    assert summary is not None
    return summary


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "gated": {"method": "gated"},
    "vpt-deep, late": {"method": "vpt-deep", "first_block": 1, "views": 2},
    "squash": {"method": "vpt-shallow", "geometry": "squash"},
    "pad": {"method": "linear", "geometry": "pad", "taps": "last"},
    "setr": {"method": "gated", "head": "setr-pup", "lr": 0.02, "epochs": 12},
    "setr, frozen": {"method": "linear", "head": "setr-pup", "lr": 0.02, "epochs": 12},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_is_served_as_it_was_measured(
    tiny: Backbone, scenes: Path, tmp_path: Path, name: str
) -> None:
    summary = train(tiny, scenes, tmp_path, **METHODS[name])
    assert summary["metrics"]["test_miou"] > 0.45, "of three classes, one is right by chance"
    engine = Engine(tiny, AdapterStore(tmp_path))
    result = evaluate_masks(engine, "scenes", str(scenes))
    assert result["revision"] == summary["revision"] and result["n"] == 4 and result["kind"] == "segmentation"
    # Batches of other sizes round differently, which decides between equal classes.
    assert result["miou"] == pytest.approx(summary["metrics"]["test_miou"], abs=2e-3)
    assert set(result["iou"]) == set(CLASSES)


def test_the_card_shows_classes_and_pictures(tiny: Backbone, scenes: Path, tmp_path: Path) -> None:
    train(tiny, scenes, tmp_path, method="linear", epochs=1)
    adapter = AdapterStore(tmp_path).load("scenes").adapter
    assert adapter.kind == "segmentation" and adapter.ignore == (VOID,) and adapter.labels == CLASSES
    card = (tmp_path / "scenes" / "README.md").read_text()
    assert "| test mIoU |" in card and all(f"| {label} | `#" in card for label in CLASSES)
    picture = decode((tmp_path / "scenes" / "masks.png").read_bytes())
    assert picture.shape == (3, 3 * (24 + 4), 3 * 32 + 2 * 4)


def tensors(root: Path) -> dict[str, torch.Tensor]:
    adapter = AdapterStore(root).load("scenes").adapter
    found = {"head": adapter.head_weight, "prompt": adapter.prompt, "gamma": adapter.gamma, **adapter.decoder}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("head", ["linear", "setr-pup"])
def test_an_interrupted_run_continues_as_if_it_had_not_been(
    tiny: Backbone, scenes: Path, tmp_path: Path, head: str
) -> None:
    settings = {"method": "gated", "epochs": 2, "head": head}
    train(tiny, scenes, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, scenes, tmp_path / "parts", Recorder(interrupt_at=1), **settings)
    train(tiny, scenes, tmp_path / "parts", resume=True, **settings)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_seeds_decide(tiny: Backbone, scenes: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        train(tiny, scenes, tmp_path / name, method="gated", epochs=1, seed=seed)
    first, again, other = (tensors(tmp_path / name) for name in ("first", "again", "other"))
    assert torch.equal(first["prompt"], again["prompt"]) and torch.equal(first["head"], again["head"])
    assert not torch.equal(first["prompt"], other["prompt"])


def test_what_frozen_blocks_give_is_computed_once(
    tiny: Backbone, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    block = tiny.model.blocks[0]
    handle = block.norm1.register_forward_hook(lambda module, inputs, output: computed.append(len(output)))
    try:
        train(tiny, scenes, tmp_path, method="linear", epochs=6)
    finally:
        handle.remove()
    windows = {split: count * 6 for split, count in (("train", 12), ("val", 4), ("test", 4))}
    assert sum(computed) == sum(windows.values())


def test_the_papers_iterations_are_scaled() -> None:
    recipe, line = choose_mask_recipe("paper")
    assert PAPER_EPOCHS == recipe.epochs == 127 and "160,000 iterations" in line and "127 epochs" in line
    assert (recipe.schedule, recipe.lr, recipe.head_lr_scale, recipe.prompts) == ("poly", 0.001, 10, 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "full"}, "--method full: segmentation is for adapters"),
        ({"window": 2.0}, "--window must lie between"),
        ({"head": "setr-pup", "norm": "standard"}, "leave --head-init, --norm out"),
        ({"first_block": "auto"}, "--first-block auto is for classification"),
        ({"top": 1}, "--top is for classification"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_mask_recipe("masks", **settings)
    with pytest.raises(UsageError, match="--recipe spt is for classification"):
        choose_mask_recipe("spt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": "11:cls"}, "for masks use last, spread"),
        ({"taps": "1,1"}, "name each block once, from 0 to 2"),
        ({"taps": "3"}, "name each block once, from 0 to 2"),
        ({"taps": "0,1", "head": "setr-pup"}, "a SETR-PUP decoder reads one block"),
    ],
)
def test_taps_that_there_are_not_are_refused(
    tiny: Backbone, scenes: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(tiny, scenes, tmp_path, **settings)


@pytest.mark.parametrize("name", ["final_fit", "nmi", "skip_unreadable"])
def test_options_for_classification_are_refused(tiny: Backbone, scenes: Path, tmp_path: Path, name: str) -> None:
    recipe, _ = choose_mask_recipe("masks", final_fit=name == "final_fit")
    job = TrainingJob("scenes", str(scenes), tmp_path, recipe)
    job = job if name == "final_fit" else dataclasses.replace(job, **{name: True})
    with pytest.raises(UsageError, match="are for classification: leave them out"):
        train_masks(tiny, job, Recorder(), World())


@pytest.fixture(scope="module")
def engine(tiny: Backbone, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("measured")
    train(tiny, scenes, root, method="linear", epochs=1)
    return Engine(tiny, AdapterStore(root))


def whole_probabilities(engine: Engine, image: torch.Tensor) -> torch.Tensor:
    (answer,) = engine.predict([("scenes", image)])
    assert isinstance(answer, Segmentation)
    logits = torch.from_numpy(answer.logits)[None]
    return F.interpolate(logits, answer.size, mode="bilinear", align_corners=False)[0].softmax(0)


def expected_miou(engine: Engine, scenes: Path, mask_of: Any) -> float:
    dataset = open_mask_test(str(scenes), CLASSES, (VOID,))
    confusion = Confusion(3)
    for sample in dataset.test:
        confusion.add(mask_of(decode(sample.read())), label_ids(sample, dataset.table))
    return confusion.miou


def published_as(engine: Engine, root: Path, mode: str, share: float) -> Engine:
    """The same adapter, served with another geometry."""
    adapter = engine.bank.store.load("scenes").adapter
    preprocess = dataclasses.replace(adapter.preprocess, crop_mode=mode, crop_pct=share)
    store = AdapterStore(root)
    store.publish(dataclasses.replace(adapter, preprocess=preprocess))
    return Engine(engine.backbone, store)


@pytest.mark.parametrize(("geometry", "share"), [("squash", 1.0), ("windows", 0.7)])
def test_whole_pictures_and_sliding_windows(
    engine: Engine, scenes: Path, tmp_path: Path, geometry: Any, share: float
) -> None:
    other = published_as(engine, tmp_path, geometry, share)
    expected = expected_miou(other, scenes, lambda image: other.predict([("scenes", image)])[0].mask)  # type: ignore[union-attr]
    result = evaluate_masks(engine, "scenes", str(scenes), Protocol(geometry))
    assert result["miou"] == pytest.approx(expected, abs=1e-3)


def test_multi_scale_averages_scales_and_mirror_images(engine: Engine, scenes: Path, tmp_path: Path) -> None:
    shares = [min(1.0, 0.7 / scale) for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
    engines = [published_as(engine, tmp_path / str(number), "windows", share) for number, share in enumerate(shares)]

    def mask_of(image: torch.Tensor) -> np.ndarray:
        total = torch.zeros(3, 24, 32)
        for other in engines:
            total += whole_probabilities(other, image) + whole_probabilities(other, image.flip(2)).flip(2)
        return total.argmax(0).numpy().astype(np.uint8)

    expected = expected_miou(engine, scenes, mask_of)
    result = evaluate_masks(engine, "scenes", str(scenes), Protocol(multi_scale=True))
    assert result["miou"] == pytest.approx(expected, abs=1e-3)


def test_void_is_never_an_answer(engine: Engine, scenes: Path) -> None:
    dataset = open_mask_test(str(scenes), CLASSES, (VOID,))
    (answer,) = engine.predict([("scenes", dataset.test[0].read())])
    assert isinstance(answer, Segmentation)
    assert answer.mask.max() < len(CLASSES) and (label_ids(dataset.test[0], dataset.table) == NOTHING).any()
