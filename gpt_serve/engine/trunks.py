"""What the first blocks made of images, kept so that a later question about an image costs only the rest.

Blocks before the first that a task touches (its trunk) make the same of an image whatever the task is, so their result
is kept by the image's pixels: tokens for the block that comes next, pooled features for heads that read one of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from threading import Lock

import torch
from cachetools import LRUCache
from torch import Tensor

from gpt_serve.engine.engine import Features, Forward, Row, distinct, normalized
from gpt_serve.engine.slab import gather, on_device
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import Layout
from gpt_serve.model.prompted import Trunk, block, embed, run_trunk, tapped_features
from gpt_serve.specs import OF_PATCHES, Tap

Image = tuple[bytes, tuple[float, ...], tuple[float, ...]]
"""The digest of an image's pixels as a row has them, the mean and the standard deviation that normalise them."""
Part = int | Tap
"""What is kept of an image: the tokens that a block reads, by its number, or what a tap reads."""


class TrunkCache:
    """Tensors on the backbone's device, by image and part; the least recently used leaves first. Safe between threads.

    Args:
        nbytes: most that they take together.

    Attributes:
        hits: images of which everything was there.
        misses: images whose trunk had to be computed.
    """

    def __init__(self, nbytes: int) -> None:
        self.hits = self.misses = 0
        self._kept: LRUCache[tuple[Image, Part], Tensor] = LRUCache(nbytes, getsizeof=lambda tensor: tensor.nbytes)
        self._lock = Lock()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return int(self._kept.currsize)

    def get(self, image: Image, parts: Sequence[Part]) -> dict[Part, Tensor] | None:
        """All ``parts`` of an image; None where one is missing."""
        with self._lock:
            found = {part: self._kept.get((image, part)) for part in parts}
            there = {part: tensor for part, tensor in found.items() if tensor is not None}
            self.hits += len(there) == len(parts)
            self.misses += len(there) != len(parts)
        return there if len(there) == len(parts) else None

    def put(self, image: Image, parts: dict[Part, Tensor]) -> None:
        """Keep parts of an image, except one that alone is larger than the cache."""
        with self._lock:
            for part, tensor in parts.items():
                if tensor.nbytes <= self._kept.maxsize:
                    self._kept[image, part] = tensor


class CachedForward:
    """Computes passes in which some first blocks are no task's own, by torch; `forward` computes the others.

    Args:
        forward: by torch or onnxruntime. It also computes what masks need: patches would fill the cache.
        cache: what is kept.
        run_block: see `tapped_features`.
    """

    def __init__(
        self, backbone: Backbone, forward: Forward, cache: TrunkCache, run_block: Callable[..., Tensor] = block
    ) -> None:
        self.backbone, self.forward, self.cache, self.run_block = backbone, forward, cache, run_block

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> Features:
        """The features of one or more rows, in order."""
        layout = Layout.joined([row.resident.place.layout for row in rows])
        blocks = min(layout.trunk, layout.last + 1)
        if not blocks or any(tap.pool in OF_PATCHES for tap in layout.taps):
            return self.forward(rows)
        unique, index = distinct(rows)
        trunk = self._trunk(unique, blocks, layout)
        adapter = gather([row.resident.place for row in rows])
        if index is not None:
            adapter = replace(adapter, images=on_device(index, self.backbone.device))
        tapped = tapped_features(self.backbone.model, trunk, adapter, run_block=self.run_block)
        return Features(adapter.layout.taps, tapped)

    def _trunk(self, rows: Sequence[Row], blocks: int, layout: Layout) -> Trunk:
        """The trunk of rows about an image each, of which only those images are computed that are not kept."""
        taps = [tap for tap in layout.taps if tap.block < blocks]
        parts: list[Part] = [*taps, *([blocks] if blocks <= layout.last else [])]
        images = [_image(row) for row in rows]
        found = {image: self.cache.get(image, parts) for image in images}
        missing = [row for row, image in zip(rows, images, strict=True) if found[image] is None]
        if missing:
            found |= self._computed(missing, blocks, taps, parts)
        whole = {part: torch.stack([kept[part] for image in images if (kept := found[image])]) for part in parts}
        tokens = whole.pop(blocks) if blocks in whole else self._no_tokens()
        return Trunk(blocks, tokens, {tap: whole[tap] for tap in taps})

    def _computed(
        self, rows: Sequence[Row], blocks: int, taps: Sequence[Tap], parts: Sequence[Part]
    ) -> dict[Image, dict[Part, Tensor] | None]:
        """The parts of images that are not kept; from now on they are."""
        pixels = normalized(rows, self.backbone.device).to(self.backbone.dtype)
        trunk = run_trunk(self.backbone.model, embed(self.backbone.model, pixels), blocks, taps)
        whole: dict[Part, Tensor] = {tap: trunk.tapped[tap] for tap in taps}
        whole[blocks] = trunk.tokens
        made: dict[Image, dict[Part, Tensor] | None] = {}
        for number, row in enumerate(rows):
            own = {part: whole[part][number].clone() for part in parts}  # a view would keep the whole batch alive
            self.cache.put(_image(row), own)
            made[_image(row)] = own
        return made

    def _no_tokens(self) -> Tensor:
        """In place of tokens that no block is left to read."""
        model = self.backbone.model
        body = model.num_prefix_tokens + model.patch_embed.num_patches
        return torch.empty(0, body, self.backbone.spec.width, device=self.backbone.device, dtype=self.backbone.dtype)


def _image(row: Row) -> Image:
    preprocess = row.resident.preprocess
    digest = blake2b(row.image.contiguous().numpy().data, digest_size=16).digest()
    return digest, preprocess.mean, preprocess.std
