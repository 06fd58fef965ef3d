"""A batch of (task, image) pairs, mixed in every way, through one forward pass."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from gpt_serve.adapter_batch import AdapterBatch
from gpt_serve.backbone import Backbone
from gpt_serve.bank import AdapterBank, Resident
from gpt_serve.errors import GPTServeError, ImageError, UndecodableImage, UsageError
from gpt_serve.images import ImageLimits, decode, from_pil, normalize, preprocess_image
from gpt_serve.prompted import embed, prompted_features
from gpt_serve.specs import Preprocess
from gpt_serve.store import AdapterStore

ImageInput = bytes | Image.Image | Tensor
"""The bytes of a file, a Pillow image, or uint8 (3, h, w) RGB."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one image.

    Attributes:
        task: the adapter's name.
        revision: the adapter file that computed it, first 12 hex digits of its SHA-256.
        labels: the ``C`` classes.
        probabilities: float32 (C,) on the CPU, summing to 1.
    """

    task: str
    revision: str
    labels: tuple[str, ...]
    probabilities: Tensor

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable (label, probability) pairs, best first; fewer when there are fewer classes."""
        values, indices = self.probabilities.topk(min(k, len(self.labels)))
        return [(self.labels[index], value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the forward pass: an adapter and its preprocessed image, uint8 (3, H, W)."""

    resident: Resident
    image: Tensor


class Forward(Protocol):
    """What computes a mixed batch."""

    def __call__(self, rows: Sequence[Row]) -> list[Prediction]:
        """The answers of one or more rows, in order."""
        ...


class TorchForward:
    """The forward pass in torch, on the backbone's device; residents lie there, too."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> list[Prediction]:
        """The answers of one or more rows, in order."""
        device = self.backbone.device
        unique, slots = slots_of(rows)
        slot = torch.tensor(slots, device=device)
        tokens = embed(self.backbone.model, normalized(rows, unique, slot))
        adapter = AdapterBatch.stack([resident.tensors for resident in unique])
        if len(unique) > 1:
            adapter = adapter.gather(slot)
        features = prompted_features(self.backbone.model, tokens, adapter)
        return _classify(features, [row.resident for row in rows])


def slots_of(rows: Sequence[Row]) -> tuple[list[Resident], list[int]]:
    """The adapters of a batch, sorted by task, and the place of each row's among them."""
    unique = sorted({id(row.resident): row.resident for row in rows}.values(), key=lambda resident: resident.task)
    places = {id(resident): place for place, resident in enumerate(unique)}
    return unique, [places[id(row.resident)] for row in rows]


def normalized(rows: Sequence[Row], unique: Sequence[Resident], slot: Tensor) -> Tensor:
    """The rows' images, each by its adapter's mean and standard deviation: (B, 3, H, W) on the device of ``slot``."""
    images = torch.stack([row.image for row in rows]).to(slot.device, non_blocking=True)
    mean = torch.tensor([resident.preprocess.mean for resident in unique], device=slot.device)
    std = torch.tensor([resident.preprocess.std for resident in unique], device=slot.device)
    return normalize(images, mean[slot], std[slot])


class Engine:
    """Answers batches for one backbone and one adapter store.

    Args:
        backbone: resident, frozen. Its spec and device are what matters when ``forward`` has weights of its own.
        store: read as it is at the time of each batch; new, changed and removed adapters take effect at once.
        capacity: adapters kept on the device; the least recently used leaves first.
        limits: of each image.
        max_batch: images per forward pass; longer lists are computed in parts.
        forward: what computes the batches; by default torch, with the backbone's weights.

    Raises:
        UsageError: ``capacity`` or ``max_batch`` is less than 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: AdapterStore,
        *,
        capacity: int = 1024,
        limits: ImageLimits = ImageLimits(),
        max_batch: int = 64,
        forward: Forward | None = None,
    ) -> None:
        if max_batch < 1:
            raise UsageError(f"a batch of {max_batch} images holds none: use a max_batch of 1 or more")
        self.backbone = backbone
        self.limits = limits
        self.max_batch = max_batch
        self.bank = AdapterBank(backbone, store, capacity)
        self.forward = forward or TorchForward(backbone)
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def predict(self, requests: Sequence[tuple[str, ImageInput]]) -> list[Prediction | GPTServeError]:
        """One result per request, in order; a bad request yields its error and disturbs no other."""
        results: list[Prediction | GPTServeError] = []
        for start in range(0, len(requests), self.max_batch):
            results += self._predict_batch(requests[start : start + self.max_batch])
        return results

    def _predict_batch(self, requests: Sequence[tuple[str, ImageInput]]) -> list[Prediction | GPTServeError]:
        # One look at the store per task: all rows of a batch answer with the same revision.
        residents = {task: self._resident(task) for task in dict.fromkeys(task for task, _ in requests)}
        prepared = list(self._threads.map(lambda request: self._prepare(residents[request[0]], request[1]), requests))
        rows = [item for item in prepared if isinstance(item, Row)]
        answers = iter(self.forward(rows) if rows else [])
        return [next(answers) if isinstance(item, Row) else item for item in prepared]

    def _resident(self, task: str) -> Resident | GPTServeError:
        try:
            return self.bank.get(task)
        except GPTServeError as error:
            return error

    def _prepare(self, resident: Resident | GPTServeError, image: ImageInput) -> Row | GPTServeError:
        """The row that the forward pass takes, or the reason why there is none."""
        if isinstance(resident, GPTServeError):
            return resident
        try:
            pixels = _pixels(image, self.limits, resident.preprocess)
            return Row(resident, preprocess_image(pixels, resident.preprocess))
        except ImageError as error:
            return error


def _classify(features: Tensor, residents: Sequence[Resident]) -> list[Prediction]:
    """Each row's head and softmax; classes differ by task, so rows (B, D) are grouped by adapter."""
    members: dict[int, list[int]] = {}
    for index, resident in enumerate(residents):
        members.setdefault(id(resident), []).append(index)
    probabilities: dict[int, Tensor] = {}
    for indices in members.values():
        resident = residents[indices[0]]
        logits = torch.addmm(resident.head_bias, features[indices], resident.head_weight.T)
        probabilities.update(zip(indices, logits.float().softmax(dim=1).cpu().unbind(), strict=True))
    return [
        Prediction(resident.task, resident.revision, resident.labels, probabilities[index])
        for index, resident in enumerate(residents)
    ]


def _pixels(image: ImageInput, limits: ImageLimits, preprocess: Preprocess) -> Tensor:
    """uint8 (3, h, w) of whatever the caller has."""
    if isinstance(image, bytes):
        return decode(image, limits, exif=preprocess.exif)
    if isinstance(image, Image.Image):
        return from_pil(image, exif=preprocess.exif)
    if not isinstance(image, Tensor):
        raise UndecodableImage(f"image must be bytes, a Pillow image or a tensor, not {type(image).__name__}")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise UndecodableImage(f"image tensor must be uint8 (3, h, w), not {image.dtype} {tuple(image.shape)}")
    return image.cpu()
