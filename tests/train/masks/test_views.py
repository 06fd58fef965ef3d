"""Inputs and the ids of their pixels: windows as serving cuts them, and crops that keep both together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpt_serve.images.preprocess import cut_windows, plan_windows
from gpt_serve.specs import Preprocess
from gpt_serve.train.masks import augment
from gpt_serve.train.masks.samples import NOTHING
from gpt_serve.train.masks.sources import open_masks
from gpt_serve.train.masks.views import MaskView, Pictures
from tests.train.masks.conftest import COLOURS, VOID

PREPROCESS = Preprocess((16, 16), 0.7, "windows", "bilinear", (0.5,) * 3, (0.5,) * 3)


def view(scenes: Path, kind: str = "crop-flip", variants: int = 0, seed: int = 0) -> MaskView:
    dataset = open_masks(str(scenes), 0, (VOID,))
    pictures = Pictures(dataset, dataset.train, exif=True)
    sizes = [(24, 32)] * len(pictures)
    return MaskView(pictures, sizes, PREPROCESS, (4, 4), kind, seed, variants)  # type: ignore[arg-type]


def batch(own: MaskView, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    own.epoch = epoch
    ((images, places),) = own.batches([list(range(len(own)))], 0)
    return images, own.labels_of(places)


def agreement(images: torch.Tensor, ids: torch.Tensor) -> float:
    """The share of pixels with a class whose colour is nearest to that of their class."""
    colours = torch.from_numpy(COLOURS).float()
    nearest = torch.cdist(images.permute(0, 2, 3, 1).reshape(-1, 3).float(), colours).argmin(1).view(ids.shape)
    known = ids != NOTHING
    assert known.float().mean() > 0.4
    return ((nearest == ids) & known).sum().item() / known.sum().item()


@pytest.mark.parametrize("kind", ["crop-flip", "crop", "none"])
def test_ids_stay_with_their_pixels(scenes: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(augment, "_varied", lambda picture, rng: picture)
    images, ids = batch(view(scenes, kind))
    assert images.shape[1:] == (3, 16, 16) and ids.shape[1:] == (16, 16) and images.dtype == ids.dtype == torch.uint8
    assert agreement(images, ids) > 0.93


def test_windows_are_those_of_serving(scenes: Path) -> None:
    own = view(scenes, "none")
    images, _ = batch(own)
    image, _ = own.pictures.read(0)
    plan = plan_windows(image, PREPROCESS, (4, 4))
    expected = torch.stack(cut_windows(image, PREPROCESS, plan))
    assert len(plan.windows) > 1 and torch.equal(images[: len(expected)], expected)


def test_crops_depend_on_seed_and_epoch_alone(scenes: Path) -> None:
    first, again, later, other = (
        batch(view(scenes, seed=seed), epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], later[0]) and not torch.equal(first[0], other[0])


def test_ids_are_the_same_whether_the_input_was_read_or_not(scenes: Path) -> None:
    """Frozen blocks give what they made of an input once more, without reading it."""
    read, unread = view(scenes, variants=2), view(scenes, variants=2)
    for epoch in (0, 1, 2):
        _, ids = batch(read, epoch)
        unread.epoch = epoch
        assert torch.equal(ids, unread.labels_of(torch.arange(len(unread))))
    assert torch.equal(batch(read, 0)[1], batch(read, 2)[1]), "two forms, taken in turn"


def test_crops_avoid_what_one_class_fills() -> None:
    ids = np.zeros((100, 100), np.uint8)
    ids[:, 90:] = 1
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        window = augment._window(ids, [100, 100], (30, 30), rng)
        top, left, height, width = window.source
        shares.append((ids[top : top + height, left : left + width] == 0).mean())
    alone = np.mean([(ids[:, left : left + 30] == 0).mean() == 1 for left in range(71)])
    assert alone > 0.8 and np.mean(np.array(shares) <= 0.75) > 0.3, "without another try it were 4 %"


def test_what_lies_outside_is_black_and_of_no_class() -> None:
    image = torch.full((3, 24, 32), 255, dtype=torch.uint8)
    plan = plan_windows(image, PREPROCESS, (4, 4))
    for seed in range(20):
        crop = augment.random_crop(image, np.zeros((24, 32), np.uint8), plan, PREPROCESS, np.random.default_rng(seed))
        outside = crop.ids == NOTHING
        assert (crop.image[:, outside] == 0).all() and (crop.image[:, ~outside] > 0).all()


def test_thinned_views_keep_whole_pictures(scenes: Path) -> None:
    own = view(scenes, "none")
    some = own.thinned(len(own) // 3)
    assert len(some.pictures) == 4 and {place.picture for place in some.places} == set(range(4))
    assert torch.equal(batch(some)[0][:2], batch(own)[0][:2])
