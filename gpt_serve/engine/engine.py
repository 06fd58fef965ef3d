"""A batch of (task, image) pairs, mixed in every way, through one forward pass."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.bank import DEFAULT_BANK_BYTES, DEFAULT_HOST_BYTES, AdapterBank, Resident
from gpt_serve.engine.classify import Prediction, classify
from gpt_serve.engine.passes import COSTS, PassPlanner
from gpt_serve.engine.segment import Cover, Segmentation, segment
from gpt_serve.engine.slab import gather, on_device
from gpt_serve.errors import BankFull, GPTServeError, ImageError, InvalidAdapter, UndecodableImage, UsageError
from gpt_serve.images.decode import ImageLimits, decode, from_pil
from gpt_serve.images.masks import Floats
from gpt_serve.images.preprocess import cut_windows, normalize, plan_windows, preprocess_image
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import block, embed, tapped_features
from gpt_serve.specs import Preprocess, Tap

Tasks = tuple[str, ...] | list[str]
"""Several tasks that are asked about one image."""
ImageInput = bytes | Image.Image | Tensor
"""The bytes of a file, a Pillow image, or uint8 (3, h, w) RGB."""

Prepared = Tensor | Cover
"""An image as rows take it: the input of the backbone, or for a mask all that cover it."""
Success = Prediction | Segmentation
"""What one task says of one image, by its kind."""
Answer = Success | GPTServeError
"""What one task says of one image, or why it cannot."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the forward pass: an adapter, held in the bank, and its preprocessed image, uint8 (3, H, W).

    Rows of one image share the tensor itself: what their tasks have in common is computed once.

    Attributes:
        work: what the row costs beside others of its kind, in row-blocks; see `gpt_serve.engine.passes`.
        trunk: the part of ``work`` that all rows of the image share.
        cover: of a segmentation task all inputs that cover the image: the row stands for one for each, see `parts`.
    """

    resident: Resident
    image: Tensor
    work: float = 1.0
    trunk: float = 0.0
    cover: Cover | None = None

    @property
    def prepared(self) -> Prepared:
        """What rows of other adapters that want the image alike may have, too."""
        return self.image if self.cover is None else self.cover

    @property
    def windows(self) -> int:
        """How many rows a pass computes for it."""
        return 1 if self.cover is None else len(self.cover.images)

    def parts(self) -> list["Row"]:
        """The rows that a pass computes."""
        if self.cover is None:
            return [self]
        return [Row(self.resident, image) for image in self.cover.images]


@dataclass(frozen=True, eq=False)
class Features:
    """What a pass made of its rows, where their heads lie.

    Attributes:
        taps: all that some row's head reads.
        tapped: for each of them (B, D).
    """

    taps: tuple[Tap, ...]
    tapped: tuple[Tensor, ...]


class Forward(Protocol):
    """What computes a pass."""

    def __call__(self, rows: Sequence[Row]) -> Features:
        """The features of one or more rows, in order."""
        ...


class TorchForward:
    """The forward pass in torch, on the backbone's device, in the backbone's dtype.

    Args:
        compiled: let ``torch.compile`` fuse the blocks: the first passes of each form then take seconds longer.
    """

    def __init__(self, backbone: Backbone, *, compiled: bool = False) -> None:
        self.backbone = backbone
        # One block is compiled, for all of them; batch sizes and prompts are left open.
        self.run_block: Callable[..., Tensor] = torch.compile(block, dynamic=True) if compiled else block

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> Features:
        """The features of one or more rows, in order."""
        unique, index = distinct(rows)
        images = normalized(unique, self.backbone.device).to(self.backbone.dtype)
        tokens = embed(self.backbone.model, images)
        adapter = gather([row.resident.place for row in rows])
        if index is not None:
            adapter = replace(adapter, images=on_device(index, self.backbone.device))
        tapped = tapped_features(self.backbone.model, tokens, adapter, run_block=self.run_block)
        return Features(adapter.layout.taps, tapped)


def distinct(rows: Sequence[Row]) -> tuple[list[Row], list[int] | None]:
    """One row of each image, and which of these each of ``rows`` is about; None when no two are about the same."""
    first: dict[tuple[int, Preprocess], int] = {}
    index = [first.setdefault((id(row.image), row.resident.preprocess), len(first)) for row in rows]
    if len(first) == len(rows):
        return list(rows), None
    return [rows[index.index(number)] for number in range(len(first))], index


def normalized(rows: Sequence[Row], device: torch.device) -> Tensor:
    """The rows' images on ``device``, each by its adapter's mean and standard deviation: float32 (B, 3, H, W)."""
    images = torch.stack([row.image for row in rows]).to(device, non_blocking=True)
    chosen = [row.resident.preprocess for row in rows]
    if len(set(chosen)) == 1:
        chosen = chosen[:1]
    mean = on_device([preprocess.mean for preprocess in chosen], device)
    std = on_device([preprocess.std for preprocess in chosen], device)
    return normalize(images, mean, std)


class Engine:
    """Answers batches for one backbone and one adapter store.

    Args:
        backbone: resident, frozen.
        store: read as it is at the time of each batch; new, changed and removed adapters take effect at once.
        bank_bytes: memory for adapters on the device; the least recently used leaves first.
        host_bytes: memory for adapters that are ready to be copied there.
        limits: of each image.
        max_batch: images per batch; longer lists are computed in parts.
        forward: what computes the passes; by default torch, with the backbone's weights.

    Raises:
        UsageError: ``max_batch`` is less than 1, or the bank's sizes cannot work.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: AdapterStore,
        *,
        bank_bytes: int = DEFAULT_BANK_BYTES,
        host_bytes: int = DEFAULT_HOST_BYTES,
        limits: ImageLimits = ImageLimits(),
        max_batch: int = 64,
        forward: Forward | None = None,
    ) -> None:
        if max_batch < 1:
            raise UsageError(f"a batch of {max_batch} images holds none: use a max_batch of 1 or more")
        self.backbone = backbone
        self.limits = limits
        self.max_batch = max_batch
        self.bank = AdapterBank(backbone, store, bank_bytes=bank_bytes, host_bytes=host_bytes)
        self.forward = forward or TorchForward(backbone)
        self.planner = planner_for(backbone)
        self.grid: tuple[int, int] = backbone.model.patch_embed.grid_size
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def close(self) -> None:
        """End the threads that decode; the engine answers no more."""
        self._threads.shutdown()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @overload
    def predict(self, requests: Sequence[tuple[str, ImageInput]]) -> list[Answer]: ...

    @overload
    def predict(self, requests: Sequence[tuple[Tasks, ImageInput]]) -> list[list[Answer]]: ...

    def predict(self, requests: Sequence[tuple[str | Tasks, ImageInput]]) -> Sequence[Answer | list[Answer]]:
        """One result per request, in order; a bad request yields its error and disturbs no other.

        A request names a task, or several for which it gets a list of answers. What the tasks of an image share is
        computed once: its decoding, and the blocks before the first that any of them touches. Each task is looked up
        once for every ``max_batch`` requests, so that these answer with the same revision.
        """
        results: list[Answer | list[Answer]] = []
        for start in range(0, len(requests), self.max_batch):
            results += self._predict_batch(requests[start : start + self.max_batch])
        return results

    def prepare(self, resident: Resident, image: ImageInput) -> Row | GPTServeError:
        """The row that the forward pass takes, or the reason why there is none. Safe to call in many threads."""
        try:
            pixels = _pixels(image, self.limits, resident.preprocess)
        except ImageError as error:
            return error
        if not resident.masks:
            return self.row(resident, preprocess_image(pixels, resident.preprocess))
        plan = plan_windows(pixels, resident.preprocess, self.grid)
        return self.row(resident, Cover(plan, cut_windows(pixels, resident.preprocess, plan)))

    def row(self, resident: Resident, prepared: Prepared) -> Row:
        """The row of an image that was prepared already, for this adapter or for another one that wants it alike."""
        layout = resident.place.layout
        work, trunk = self.planner.image(layout), self.planner.trunk(layout)
        if isinstance(prepared, Tensor):
            return Row(resident, prepared, work, trunk)
        work += self.planner.head(resident.place.form, self.grid)
        count = len(prepared.images)
        return Row(resident, prepared.images[0], count * work, count * trunk, prepared)

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row]) -> list[Answer]:
        """The answers of rows of any mix, in order; in one thread at a time.

        An adapter whose weights are finite but so large that its probabilities are no numbers gets `InvalidAdapter`.
        """
        if not rows:
            return []
        parts = [part for row in rows for part in row.parts()]
        found: dict[int, Prediction | Floats] = {}
        images = [id(part.image) for part in parts]
        for chosen in self.planner.plan([part.resident.place.layout for part in parts], images):
            some = [parts[index] for index in chosen]
            found |= zip(
                chosen, read_heads(self.forward(some), [part.resident for part in some], self.grid), strict=True
            )
        ordered = iter(found[index] for index in range(len(parts)))
        return [_joined(row, [next(ordered) for _ in row.parts()]) for row in rows]

    def _predict_batch(self, requests: Sequence[tuple[str | Tasks, ImageInput]]) -> list[Answer | list[Answer]]:
        """Task by task: those that the bank holds together share a batch, and each is taken once."""
        asked = [[task] if isinstance(task, str) else list(task) for task, _ in requests]
        answers: list[dict[str, Answer]] = [{} for _ in requests]
        residents: dict[str, Resident | GPTServeError] = {}
        try:
            for task in dict.fromkeys(task for tasks in asked for task in tasks):
                try:
                    residents[task] = self.bank.take(task, timeout=0)
                except BankFull:  # of the very adapters that this batch holds: use them and let them go
                    self._answer(requests, asked, residents, answers)
                    self._release(residents)
                    residents[task] = self._take(task)
                except GPTServeError as error:
                    residents[task] = error
            self._answer(requests, asked, residents, answers)
        finally:
            self._release(residents)
        return [
            own[task] if isinstance(task, str) else [own[name] for name in task]
            for own, (task, _) in zip(answers, requests, strict=True)
        ]

    def _take(self, task: str) -> Resident | GPTServeError:
        """The adapter, however long others hold the bank."""
        try:
            return self.bank.take(task)
        except GPTServeError as error:
            return error

    def _release(self, residents: dict[str, Resident | GPTServeError]) -> None:
        while residents:
            _, resident = residents.popitem()
            if isinstance(resident, Resident):
                self.bank.release(resident)

    def _answer(
        self,
        requests: Sequence[tuple[object, ImageInput]],
        asked: Sequence[Sequence[str]],
        residents: Mapping[str, Resident | GPTServeError],
        answers: Sequence[dict[str, Answer]],
    ) -> None:
        """Put the answers of ``residents`` to the requests that ask for them into ``answers``."""
        wanted = [(number, task) for number, tasks in enumerate(asked) for task in tasks if task in residents]
        usable: list[tuple[int, str, Resident]] = []
        for number, task in dict.fromkeys(wanted):
            resident = residents[task]
            if isinstance(resident, Resident):
                usable.append((number, task, resident))
            else:
                answers[number][task] = resident.fresh()
        # The same image for several tasks, or from several requests, is decoded once for each way of preprocessing.
        keys = [(_identity(requests[number][1]), resident.preprocess, resident.masks) for number, _, resident in usable]
        first = {key: (resident, requests[number][1]) for key, (number, _, resident) in zip(keys, usable, strict=True)}
        prepared = dict(zip(first, self._threads.map(lambda item: self.prepare(*item), first.values()), strict=True))
        rows: list[tuple[int, str, Row]] = []
        for key, (number, task, resident) in zip(keys, usable, strict=True):
            row = prepared[key]
            if isinstance(row, Row):
                rows.append((number, task, self.row(resident, row.prepared)))
            else:
                answers[number][task] = row.fresh()
        for (number, task, _), answer in zip(rows, self.compute([row for *_, row in rows]), strict=True):
            answers[number][task] = answer


def _identity(image: ImageInput) -> Hashable:
    """Equal for equal files, and for the very same picture in memory."""
    return image if isinstance(image, bytes) else id(image)


def planner_for(backbone: Backbone) -> PassPlanner:
    """How batches become passes on the backbone's device."""
    embedding = backbone.model.patch_embed
    body = backbone.model.num_prefix_tokens + embedding.num_patches
    return PassPlanner(body, backbone.spec.width, COSTS[backbone.device.type])


def read_heads(features: Features, residents: Sequence[Resident], grid: tuple[int, int]) -> list[Prediction | Floats]:
    """What each row's head makes of a pass: a prediction, or the logits (C, y, x) of a segmentation task."""
    found: dict[int, Prediction | Floats] = dict(segment(features.tapped, features.taps, residents, grid))
    others = [index for index in range(len(residents)) if index not in found]
    if others:
        found |= zip(others, classify(features, residents, others), strict=True)
    return [found[index] for index in range(len(residents))]


def _joined(row: Row, found: Sequence[Prediction | Floats]) -> Answer:
    """The answer to a row from what its parts came to, if that is numbers."""
    answer = found[0] if row.cover is None else row.cover.answer(row.resident, cast(Sequence[Floats], found))
    assert isinstance(answer, Prediction | Segmentation)
    numbers = answer.probabilities.numpy() if isinstance(answer, Prediction) else answer.logits
    if np.isfinite(numbers).all():
        return answer
    return InvalidAdapter(f"adapter {answer.task!r} is refused: its probabilities for this image are no numbers")


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
