"""Pictures and labels as training reads them: windows that cover each picture, or one random crop of each.

Both go through the same `View` as classification, so that what frozen blocks make of an input can be kept (`Inputs`):
the target of an input is its number, by which `MaskView.labels_of` finds the ids of its pixels.

Shapes: input ``H, W`` pixels, grid ``gh, gw`` patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gpt_serve.errors import ImageError
from gpt_serve.images.decode import LOCAL_LIMITS, decode
from gpt_serve.images.masks import Tiling
from gpt_serve.images.preprocess import cut_windows, plan_windows
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.samples import Sample, cannot_read
from gpt_serve.train.data.views import View
from gpt_serve.train.masks.augment import Crop, flipped, random_crop, window_ids
from gpt_serve.train.masks.samples import Ids, MaskDataset, MaskSample, label_ids
from gpt_serve.train.recipes.recipe import Augment

CACHE_BYTES = 1 << 30
"""Decoded pictures and ids are kept in memory up to this size; what exceeds it is read again each epoch."""


class Pictures:
    """The pictures of a split and the ids of their pixels; the first ones that are read stay in memory.

    Args:
        samples: were checked: all of them can be read.
    """

    def __init__(self, dataset: MaskDataset, samples: Sequence[MaskSample], exif: bool) -> None:
        self.samples = samples
        self.exif = exif
        self._table = dataset.table
        self._kept: dict[int, tuple[Tensor, Ids]] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Tensor, Ids]:
        """A picture, uint8 (3, h, w), and the ids of its pixels, uint8 (h, w).

        Raises:
            DataError: it cannot be read any more.
        """
        if index in self._kept:
            return self._kept[index]
        sample = self.samples[index]
        try:
            image = decode(sample.read(), LOCAL_LIMITS, exif=self.exif)
        except (ImageError, OSError) as error:
            raise cannot_read(Sample(sample.name, sample.read, index), error) from error
        ids = label_ids(sample, self._table)
        size = image.numel() + ids.size
        if size <= self._room:
            self._room -= size
            self._kept[index] = image, ids
        return image, ids


@dataclass(frozen=True)
class Place:
    """An input: which picture it is of, and which of the windows of its plan; None for a crop of it."""

    picture: int
    window: int | None


class MaskView(View):
    """A split as inputs: ``view[i]`` is an image, uint8 (3, H, W), and ``i``.

    Args:
        pictures: of the split.
        sizes: (h, w) of each.
        grid: patches of an input.
        augment: ``none`` for the windows that cover each picture, as serving cuts them; otherwise one crop of each,
            with ``crop-flip`` mirrored half of the time.
    """

    def __init__(
        self,
        pictures: Pictures,
        sizes: Sequence[tuple[int, int]],
        preprocess: Preprocess,
        grid: tuple[int, int],
        augment: Augment,
        seed: int,
        variants: int = 0,
    ) -> None:
        self.pictures, self.sizes, self.grid = pictures, sizes, grid
        plans = [plan_windows(torch.empty(3, *size, device="meta"), preprocess, grid) for size in sizes]
        self.plans: list[Tiling] = plans
        if augment == "none":
            self.places = [Place(number, at) for number, plan in enumerate(plans) for at in range(len(plan.windows))]
        else:
            self.places = [Place(number, None) for number in range(len(plans))]
        samples = [Sample(pictures.samples[place.picture].name, bytes, at) for at, place in enumerate(self.places)]
        super().__init__(samples, preprocess, [], augment, seed, variants)
        height, width = preprocess.input_size
        self._ids: dict[tuple[int, int], Tensor] = {}  # by variant and place
        self._keeps = 0 < self.forms * len(samples) * height * width <= CACHE_BYTES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The input at a place, cut or drawn."""
        crop = self._cut(index)
        if self._keeps or not self.forms:
            self._ids[self.variant, index] = crop.ids
        return crop.image, index

    def labels_of(self, places: Tensor) -> Tensor:
        """The ids (B, H, W), uint8, of the pixels of the inputs at ``places``, (B,)."""
        return torch.stack([self._labels(index) for index in places.tolist()])

    def _labels(self, index: int) -> Tensor:
        """Those that were made with the input, if it was made just now or if there is room to keep them all."""
        key = self.variant, index
        ids = self._ids.get(key) if self._keeps else self._ids.pop(key, None)
        if ids is None:
            ids = self._cut(index).ids
            if self._keeps:
                self._ids[key] = ids
        return ids

    def _cut(self, index: int) -> Crop:
        """The input at a place with its ids; of a crop the form that the epoch takes."""
        place = self.places[index]
        image, ids = self.pictures.read(place.picture)
        plan = self.plans[place.picture]
        if place.window is None:
            rng = np.random.default_rng((self.seed, self.variant, index))
            crop = random_crop(image, ids, plan, self.preprocess, rng)
            return flipped(crop) if self.augment == "crop-flip" and rng.random() < 0.5 else crop
        one = replace(plan, windows=(plan.windows[place.window],))
        return Crop(cut_windows(image, self.preprocess, one)[0], window_ids(ids, one, self.preprocess))

    def drawn(self, augment: Augment, epoch: int = 0) -> "MaskView":
        """A view of the same pictures that is augmented in another way."""
        view = MaskView(self.pictures, self.sizes, self.preprocess, self.grid, augment, self.seed, self.variants)
        view.epoch = epoch
        return view

    def thinned(self, most: int) -> "MaskView":
        """A view of some pictures, evenly spread, whose windows are about ``most`` at most."""
        step = max(1, -(-len(self.places) // most))
        if step == 1:
            return self
        chosen = range(0, len(self.pictures), step)
        pictures = _Some(self.pictures, list(chosen))
        sizes = [self.sizes[index] for index in chosen]
        return MaskView(pictures, sizes, self.preprocess, self.grid, self.augment, self.seed, self.variants)


class _Some(Pictures):
    """Some of the pictures of another split."""

    def __init__(self, whole: Pictures, chosen: Sequence[int]) -> None:
        self.whole, self.chosen = whole, chosen
        self.samples = [whole.samples[index] for index in chosen]

    def read(self, index: int) -> tuple[Tensor, Ids]:
        return self.whole.read(self.chosen[index])
