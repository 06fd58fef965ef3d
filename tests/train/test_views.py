import os
from pathlib import Path

import pytest
import torch

from gpt_serve.errors import DataError
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.samples import Sample, local_sample
from gpt_serve.train.data.views import View, ordered_batches, scan, shuffled_batches
from tests.tiny_vit import PREPROCESS

CROPPED = Preprocess(**PREPROCESS.to_dict() | {"crop_pct": 0.5})


def test_every_index_appears_once_in_an_order_of_the_seed_and_epoch() -> None:
    batches = shuffled_batches(10, 4, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(index for batch in batches for index in batch) == list(range(10))
    assert batches == shuffled_batches(10, 4, seed=0, epoch=0)
    assert batches != shuffled_batches(10, 4, seed=0, epoch=1)
    assert batches != shuffled_batches(10, 4, seed=1, epoch=0)
    assert ordered_batches(5, 2) == [[0, 1], [2, 3], [4]]


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    samples = open_dataset("digits", seed=0).test[:6]
    scaled = scan(samples, CROPPED, lambda: None).scaled
    view = View(samples, CROPPED, scaled, "crop-flip", seed=3)
    first = [view[index][0] for index in range(6)]
    again = [view[index][0] for index in reversed(range(6))][::-1]
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    view.epoch = 1
    assert any(not torch.equal(left, view[index][0]) for index, left in enumerate(first))
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image in first)


def test_flips_happen_about_half_of_the_time() -> None:
    sample = open_dataset("digits", seed=0).test[0]
    scaled = scan([sample], PREPROCESS, lambda: None).scaled
    view = View([sample], PREPROCESS, scaled, "crop-flip", seed=0)
    plain = View([sample], PREPROCESS, scaled, "none", seed=0)[0][0]
    flipped = 0
    for epoch in range(100):
        view.epoch = epoch
        image = view[0][0]
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(2))
        flipped += not torch.equal(image, plain)
    assert 30 < flipped < 70


def test_crops_lie_anywhere_in_the_image() -> None:
    """Pixels that hold their own row and column; windows of 16 in 20 by 18 pixels."""
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(18), indexing="ij")
    image = torch.stack([rows, columns, columns]).byte()
    view = View(open_dataset("digits", seed=0).test[:1], CROPPED, [image], "crop", seed=0)
    corners = set()
    for view.epoch in range(200):
        crop = view[0][0]
        top, left = int(crop[0, 0, 0]), int(crop[1, 0, 0])
        assert torch.equal(crop, image[:, top : top + 16, left : left + 16])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(5) for left in range(3)}


def test_images_beyond_the_cache_are_decoded_again_to_the_same_pixels() -> None:
    samples = open_dataset("digits", seed=0).test[:5]
    cached = scan(samples, CROPPED, lambda: None)
    streamed = scan(samples, CROPPED, lambda: None, room=100)
    assert cached.scaled is not None
    assert streamed.scaled is None
    assert cached.hashes == streamed.hashes
    pair = [View(samples, CROPPED, result.scaled, "crop-flip", seed=1) for result in (cached, streamed)]
    (left, targets), (right, others) = (next(iter(view.batches([[0, 2, 4]], workers=0))) for view in pair)
    assert torch.equal(left, right)
    assert torch.equal(targets, others)


def test_decoding_processes_need_no_shared_memory() -> None:
    """Of which containers have 64 MB by default; tensors that come from processes would lie there."""
    samples = open_dataset("digits", seed=0).test[:4]
    view = View(samples, CROPPED, None, "none", seed=0)
    images, targets = next(view.batches([[0, 1, 2, 3]], workers=1))
    assert not images.is_shared() and not targets.is_shared()
    assert targets.tolist() == [sample.target for sample in samples] and targets.dtype == torch.int64
    assert torch.equal(images, torch.stack([view[index][0] for index in range(4)]))


def test_a_decoding_process_that_dies_is_one_line() -> None:
    def die() -> bytes:
        os._exit(1)

    view = View([Sample("x", die, 0)], CROPPED, None, "none", seed=0)
    with pytest.raises(DataError, match="^a decoding process was killed.*: use fewer --workers") as caught:
        next(view.batches([[0]], workers=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_while_training_is_one_line(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "gone.png"
    view = View([local_sample(path, 0)], CROPPED, None, "none", seed=0)
    with pytest.raises(DataError, match=f"^cannot read {path}: No such file or directory; replace or remove it$"):
        next(view.batches([[0]], workers))
