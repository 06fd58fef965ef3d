"""Does a graph answer as torch does? On noise, on photographs, and on a task's own images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.unknown import known_share
from gpt_serve.errors import ExportError
from gpt_serve.export.session import Array
from gpt_serve.images.preprocess import normalize, preprocess_image
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.heads import linear, probabilities, stranger_distance
from gpt_serve.model.prompted import embed, prompted_features
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.datasets import Sample, open_evaluation
from gpt_serve.train.data.samples import decoded

BATCHES = (1, 2, 7)
DATA_BATCH = 32
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "int8": float("inf")}  # of probabilities; int8 is judged by its accuracy
PHOTOS = 7
KNOWN_TOLERANCE = {"fp32": 0.02, "fp16": 0.1, "int8": float("inf")}
"""Of the share of validation images that lie as far out: at a knot, rounding makes a step of one of them."""

Answer = Callable[[Tensor], Array]
"""uint8 (B, 3, h, w) to probabilities (B, C), or to shares of validation images that lie as far out (B,)."""


@dataclass
class Tally:
    """What comparing probabilities has found so far."""

    max_abs_difference: float = 0.0
    images: int = 0
    agreed: int = 0
    labelled: int = 0
    known_difference: float | None = None  # the largest, of what tells strangers
    correct: dict[str, int] = field(default_factory=lambda: {"torch": 0, "graph": 0})

    def add(self, expected: Array, actual: Array, targets: Sequence[int] | None = None) -> None:
        """Compare (B, C) probabilities; ``targets`` are the true classes where they are known."""
        self.differ(expected, actual)
        best = {"torch": expected.argmax(axis=1), "graph": actual.argmax(axis=1)}
        self.images += len(expected)
        self.agreed += int((best["torch"] == best["graph"]).sum())
        if targets is not None:
            self.labelled += len(targets)
            for name, classes in best.items():
                self.correct[name] += int((classes == np.asarray(targets)).sum())

    def differ(self, expected: Array, actual: Array) -> None:
        """Note the largest difference alone, of answers that have been counted in other batches."""
        difference = float(np.abs(expected - actual).max())
        self.max_abs_difference = max(self.max_abs_difference, difference if np.isfinite(difference) else float("inf"))

    def accuracy(self, name: str) -> float:
        """Return the accuracy of ``torch`` or ``graph`` on the images whose class is known, in [0, 1]."""
        return self.correct[name] / self.labelled

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored in the graph's metadata."""
        report: dict[str, Any] = {
            "max_abs_difference": self.max_abs_difference,
            "top1_agreement": self.agreed / self.images,
            "images": self.images,
            "batches": list(BATCHES),
            "torch": torch.__version__,
            "onnxruntime": ort.__version__,
        }
        if self.known_difference is not None:
            report["known_difference"] = self.known_difference
        if self.labelled:
            report["accuracy"] = {name: self.accuracy(name) for name in self.correct} | {"images": self.labelled}
        return report


def verify(
    backbone: Backbone, adapter: Adapter, answer: Answer, data: str | None, known: Answer | None = None
) -> Tally:
    """Compare ``answer`` with the unfolded forward pass in torch, float32.

    Args:
        known: of the graph, where it can tell strangers.
        data: image folder or built-in dataset, as for ``eval``; None for noise and photographs only.

    Raises:
        DataError: the images cannot be read.
    """
    tally = Tally()
    reference = torch_answer(backbone, adapter)
    images = torch.cat([_noise(backbone), _photographs(adapter.preprocess)])
    expected = reference(images)
    for batch in BATCHES:
        actual = np.concatenate([answer(part) for part in torch.split(images, batch)])
        (tally.add if batch == BATCHES[0] else tally.differ)(expected, actual)
    if known is not None:
        difference = np.abs(torch_known(backbone, adapter)(images) - known(images)).max()
        tally.known_difference = float(difference) if np.isfinite(difference) else float("inf")
    for pixels, targets in _evaluation_batches(adapter, data):
        tally.add(reference(pixels), answer(pixels), targets)
    return tally


def check(tally: Tally, precision: str, task: str) -> None:
    """Raise `ExportError` when the graph is further from torch than its precision explains."""
    if not tally.max_abs_difference <= TOLERANCE[precision]:
        raise ExportError(
            f"the graph of {task!r} does not answer as torch does: probabilities differ by up to "
            f"{tally.max_abs_difference:.2g}, {TOLERANCE[precision]:g} are allowed in {precision}; nothing was written"
        )
    if tally.known_difference is not None and not tally.known_difference <= KNOWN_TOLERANCE[precision]:
        raise ExportError(
            f"the graph of {task!r} does not tell strangers as torch does: shares differ by up to "
            f"{tally.known_difference:.2g}, {KNOWN_TOLERANCE[precision]:g} are allowed in {precision}; nothing was "
            "written"
        )


def check_accuracy(tally: Tally, max_drop: float, force: bool, task: str) -> None:
    """Raise `ExportError` when the graph loses more than ``max_drop`` percentage points and ``force`` is not set."""
    drop = 100 * (tally.correct["torch"] - tally.correct["graph"]) / tally.labelled
    if drop > max_drop and not force:
        raise ExportError(
            f"int8 loses {drop:.2f} points of accuracy on {task!r} ({tally.labelled} images), {max_drop:g} are "
            "allowed: raise --max-drop, or pass --force; nothing was written"
        )


def torch_answer(backbone: Backbone, adapter: Adapter) -> Answer:
    """Return the adapter's own forward pass in torch, with nothing folded."""
    head, several = (adapter.head_weight, adapter.head_bias), adapter.threshold is not None
    return _in_torch(backbone, adapter, lambda read: probabilities(linear(read, *head), several))


def torch_known(backbone: Backbone, adapter: Adapter) -> Answer:
    """Return what the adapter tells of strangers, in torch, with nothing folded."""
    unknown = adapter.unknown
    assert unknown is not None
    measures = unknown.mean, unknown.scale, unknown.basis
    return _in_torch(backbone, adapter, lambda read: known_share(unknown.knots, stranger_distance(read, *measures)))


def _in_torch(backbone: Backbone, adapter: Adapter, head: Callable[[Tensor], Tensor]) -> Answer:
    """Return ``head`` of the features (B, K*D) that the adapter's forward pass makes of images."""
    tensors = AdapterBatch.of(adapter, backbone.spec, "cpu")
    mean, std = (torch.tensor([values]) for values in (adapter.preprocess.mean, adapter.preprocess.std))

    @torch.inference_mode()
    def answer(images: Tensor) -> Array:
        tokens = embed(backbone.model, normalize(images, mean, std))
        return head(prompted_features(backbone.model, tokens, tensors)).numpy()

    return answer


def _noise(backbone: Backbone) -> Tensor:
    height, width = backbone.spec.preprocess.input_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (max(BATCHES), 3, height, width), generator=generator, dtype=torch.uint8)


def _photographs(preprocess: Preprocess) -> Tensor:
    """Cut parts out of the two photographs that scikit-learn ships, preprocessed."""
    photos = [torch.from_numpy(photo.copy()) for photo in load_sample_images().images]  # type: ignore[no-untyped-call]
    parts = []
    for index, photo in enumerate(islice(cycle(photos), PHOTOS)):
        side = 420 - 40 * index
        top, left = 1 + index, 30 * index
        parts.append(preprocess_image(photo[top : top + side, left : left + side].permute(2, 0, 1), preprocess))
    return torch.stack(parts)


def _evaluation_batches(adapter: Adapter, data: str | None) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield batches of preprocessed images (B, 3, h, w) with their classes."""
    samples = () if data is None else open_evaluation(data, adapter.labels).test
    for start in range(0, len(samples), DATA_BATCH):
        chunk = samples[start : start + DATA_BATCH]
        yield torch.stack([_pixels(item, adapter.preprocess) for item in chunk]), [item.target for item in chunk]


def _pixels(sample: Sample, preprocess: Preprocess) -> Tensor:
    return preprocess_image(decoded(sample, exif=preprocess.exif), preprocess)
