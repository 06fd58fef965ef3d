"""Samples as tensors: the check that every image can be read, the cache of scaled images, and the augmentation."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpt_serve.errors import DataError, ImageError
from gpt_serve.images.decode import LOCAL_LIMITS, decode
from gpt_serve.images.preprocess import center_crop, resize
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.datasets import Sample, Split
from gpt_serve.train.data.duplicates import SIDE, thumbnail
from gpt_serve.train.data.samples import decoded, multi_hot, pick, rank_in_class, reason
from gpt_serve.train.recipes.recipe import Augment

# Scaled images of a data set are kept in memory up to this size; splits that exceed it are decoded again each epoch.
CACHE_BYTES = 1 << 30


Target = int | np.ndarray
"""A class, or int64 (C,) that is 1 for each label of an image."""


@dataclass(frozen=True)
class Unreadable:
    """The name of an image that cannot be read, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """The result of reading every image of a split once.

    Attributes:
        hashes: SHA-256 of each sample's bytes, in order; empty where unreadable.
        scaled: uint8 (3, h, w) of each sample, before the crop; None when they exceed their room.
        unreadable: the images that failed.
        thumbnails: uint8 (n, 3 * SIDE * SIDE) of `near_duplicates`, without those that failed.
    """

    hashes: list[str]
    scaled: list[Tensor] | None
    unreadable: list[Unreadable]
    thumbnails: Tensor

    @property
    def cached(self) -> int:
        """Size of ``scaled`` in bytes."""
        return sum(image.numel() for image in self.scaled or ())


def scan(samples: Split, preprocess: Preprocess, on_image: Callable[[], object], room: int = CACHE_BYTES) -> Scan:
    """Decode every sample once, in parallel.

    Args:
        preprocess: how to scale the images.
        on_image: called after each image.
        room: how many bytes the scaled images may take; if they need more, none are kept.
    """
    hashes: list[str] = []
    thumbnails: list[Tensor] = []
    unreadable: list[Unreadable] = []
    scaled: list[Tensor] | None = []
    used = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        # In order and a window at a time, so that a large dataset is never held whole.
        for start in range(0, len(samples), 256):
            window = samples[start : start + 256]
            for result in threads.map(lambda sample: _read(sample, preprocess), window):
                on_image()
                if isinstance(result, Unreadable):
                    hashes.append("")
                    unreadable.append(result)
                    continue
                image, name = result
                hashes.append(name)
                thumbnails.append(thumbnail(image))
                used += image.numel()
                if used > room:
                    scaled = None
                if scaled is not None:
                    scaled.append(image)
    small = torch.stack(thumbnails) if thumbnails else torch.empty(0, 3 * SIDE * SIDE, dtype=torch.uint8)
    return Scan(hashes, None if unreadable else scaled, unreadable, small)


def _read(sample: Sample, preprocess: Preprocess) -> tuple[Tensor, str] | Unreadable:
    try:
        data = sample.read()
        return resize(decode(data, LOCAL_LIMITS, exif=preprocess.exif), preprocess), hashlib.sha256(data).hexdigest()
    except (ImageError, OSError) as error:
        return Unreadable(sample.name, reason(error))


class View(Dataset[tuple[Tensor, Target]]):
    """A split as training reads it: ``view[i]`` is an image, uint8 (3, H, W), and its target.

    An image's augmentation depends on the seed, its `variant` and its index alone, so that worker processes and
    resumed runs give the same images.

    Args:
        variants: how many augmented images there are of each, which epochs take in turn; 0 for new ones every epoch.
        classes: ``C`` where images have several labels: then targets are 1 for each of these, and 0; 0 for one label.
    """

    def __init__(
        self,
        samples: Split,
        preprocess: Preprocess,
        scaled: list[Tensor] | None,
        augment: Augment,
        seed: int,
        variants: int = 0,
        classes: int = 0,
    ) -> None:
        self.samples = samples
        self.preprocess = preprocess
        self.scaled = scaled
        self.augment = augment
        self.seed = seed
        self.variants = variants
        self.classes = classes
        self.epoch = 0

    @property
    def forms(self) -> int:
        """How many different images there are of each; 0 for a new one every epoch."""
        return 1 if self.augment == "none" else self.variants

    @property
    def variant(self) -> int:
        """Which of an image's forms this epoch takes."""
        return self.epoch % self.forms if self.forms else self.epoch

    def __len__(self) -> int:
        return len(self.samples)

    def target(self, index: int) -> Target:
        """The class of an image; where images have several labels int64 (C,), 1 for each of them."""
        sample = self.samples[index]
        return multi_hot([sample], self.classes)[0].numpy() if self.classes else sample.target

    def targets(self, indices: Sequence[int]) -> Tensor:
        """The targets of images, int64 (n,) or (n, C)."""
        return torch.from_numpy(np.array([self.target(index) for index in indices], dtype=np.int64))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Read an image, or take it from the cache, and crop or augment it.

        Raises:
            DataError: it can no longer be read, as it could when it was checked.
        """
        sample = self.samples[index]
        if self.scaled is None:
            image = resize(decoded(sample, exif=self.preprocess.exif), self.preprocess)
        else:
            image = self.scaled[index]
        if self.augment == "none":
            return center_crop(image, self.preprocess), self.target(index)
        rng = np.random.default_rng((self.seed, self.variant, index))
        return _random_crop(image, self.preprocess.input_size, rng, flip=self.augment == "crop-flip"), self.target(
            index
        )

    def drawn(self, augment: Augment, epoch: int = 0) -> "View":
        """A view of the same images that is augmented in another way."""
        view = self.of(self.samples, self.scaled, augment)
        view.epoch = epoch
        return view

    def of(self, samples: Split, scaled: list[Tensor] | None, augment: Augment | None = None) -> "View":
        """A view of other images that is as this one in everything else."""
        view = (samples, self.preprocess, scaled, augment or self.augment, self.seed, self.variants, self.classes)
        return View(*view)

    def batches(self, indices: list[list[int]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images, uint8 (B, 3, H, W), and targets, int64 (B,) or (B, C), of each batch.

        Args:
            indices: a list for each batch, of the places of its samples.
            workers: number of processes that decode when the images are not cached.

        Raises:
            DataError: an image can no longer be read, or a process was killed.
        """
        loader: DataLoader[Drawn] = DataLoader(
            _Drawing(self),
            batch_sampler=indices,
            num_workers=0 if self.scaled is not None else workers,
            collate_fn=_stacked,
            generator=torch.Generator(),  # or it draws from the global one, and dropout would depend on what is read
        )
        with _workers_errors():
            for batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                yield torch.from_numpy(batch[0]), torch.from_numpy(batch[1])


Drawn = tuple[Tensor, Target] | DataError


@dataclass(frozen=True)
class _Drawing(Dataset[Drawn]):
    """A view that returns errors as values: what a decoding process raises would arrive as a long traceback."""

    view: View

    def __getitem__(self, index: int) -> Drawn:
        try:
            return self.view[index]
        except DataError as error:
            return error


@contextmanager
def _workers_errors() -> Iterator[None]:
    """Make the death of a decoding process, as when memory runs out, an error of one line."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower class for it
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            "a decoding process was killed, perhaps for lack of memory: use fewer --workers, or 0 to do without them"
        ) from error


def _stacked(drawn: list[Drawn]) -> tuple[np.ndarray, np.ndarray] | DataError:
    """Stack a batch as arrays (B, 3, H, W) and (B,) or (B, C), which decoding processes send through a pipe.

    Tensors would go through shared memory, of which a container has 64 MB unless its user asks for more.
    """
    failed = [item for item in drawn if isinstance(item, DataError)]
    if failed:
        return failed[0]
    images, targets = zip(*drawn, strict=True)
    return np.stack([image.numpy() for image in images]), np.array(targets, dtype=np.int64)


def joined(first: View, second: View) -> View:
    """A view of the images of both, which are augmented as the first view has it."""
    scaled = None if first.scaled is None or second.scaled is None else first.scaled + second.scaled
    samples = [*first.samples, *second.samples]
    return first.of(samples, scaled)


def thinned(view: View, most: int) -> View:
    """A view of at most ``most`` images, which the view's seed draws.

    Each class keeps its share of the images, and one image at least while ``most`` allows it.
    """
    if len(view) <= most:
        return view
    order = np.random.default_rng(view.seed).permutation(len(view))
    targets = np.array([sample.target for sample in view.samples])[order]
    # The first of each class come first, then the others evenly: half of every class before the other half.
    place = rank_in_class(targets) / np.bincount(targets)[targets]
    chosen = np.sort(order[np.argsort(place, kind="stable")[:most]]).tolist()
    scaled = None if view.scaled is None else [view.scaled[index] for index in chosen]
    return view.of(pick(view.samples, chosen), scaled)


def _random_crop(image: Tensor, size: tuple[int, int], rng: np.random.Generator, *, flip: bool) -> Tensor:
    """Cut a random window (3, H, W) out of an image; if ``flip``, mirror it half of the time."""
    top = int(rng.integers(0, image.shape[1] - size[0] + 1))
    left = int(rng.integers(0, image.shape[2] - size[1] + 1))
    crop = image[:, top : top + size[0], left : left + size[1]]
    if flip and rng.random() < 0.5:
        crop = crop.flip(2)
    return crop.contiguous()


def ordered_batches(count: int, size: int) -> list[list[int]]:
    """Split the indices 0 to ``count - 1`` into batches of ``size``, in order."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def shuffled_batches(count: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Split the indices 0 to ``count - 1`` into batches of ``size``, in an order that ``seed`` and ``epoch`` decide."""
    order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count)).tolist()
    return [order[start : start + size] for start in range(0, count, size)]
