"""What a module says of a whole split: logits, classes with their confidences, probabilities of labels.

Shapes: images ``n``, classes ``C``, temperatures ``T``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.views import View, ordered_batches
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.loop import EVAL_BATCH, forward_logits
from gpt_serve.train.methods.modules import TaskModule


@dataclass(frozen=True, eq=False)
class Answers:
    """What a module says of the images of a split, on the CPU.

    Attributes:
        predictions: int64 (n,), the most probable classes.
        targets: int64 (n,), the true ones.
        confidences: float32 (T, n), the probabilities of ``predictions`` at each temperature that was asked for.
    """

    predictions: Tensor
    targets: Tensor
    confidences: Tensor

    @property
    def accuracy(self) -> float:
        """The share of predictions that are right, in [0, 1]."""
        return (self.predictions == self.targets).double().mean().item()

    @property
    def metrics(self) -> dict[str, float]:
        """What is told of them, by name."""
        return {"accuracy": self.accuracy}

    @property
    def right(self) -> Tensor:
        """Whether what each of ``confidences`` is the probability of is true, bool (n,)."""
        return self.predictions == self.targets


@dataclass(frozen=True, eq=False)
class LabelAnswers:
    """What a module says of images with several labels, on the CPU.

    Attributes:
        probabilities: float32 (T, n, C) at each temperature that was asked for.
        targets: int64 (n, C), 1 for each label of an image.
    """

    probabilities: Tensor
    targets: Tensor

    @property
    def accuracy(self) -> float:
        """The share of labels that are rightly given or not, at a threshold of a half, in [0, 1]."""
        return ((self.probabilities[-1] > 0.5) == (self.targets > 0)).double().mean().item()

    @property
    def average_precisions(self) -> Tensor:
        """float64 (C,), of each label; NaN where no image has it."""
        return average_precisions(self.probabilities[-1], self.targets)

    @property
    def metrics(self) -> dict[str, float]:
        """What is told of them, by name."""
        return {"accuracy": self.accuracy, "map": self.average_precisions.nanmean().item()}

    @property
    def confidences(self) -> Tensor:
        """float32 (T, n * C), the probabilities of labels that an image may have or not."""
        return self.probabilities.flatten(1)

    @property
    def right(self) -> Tensor:
        """Whether what each of ``confidences`` is the probability of is true, bool (n * C,)."""
        return self.targets.flatten() > 0


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """float64 (C,): the area under each label's curve of precision over recall, in steps; NaN where no image has it.

    Args:
        scores: (n, C).
        targets: (n, C), 1 or 0.
    """
    values = [
        average_precision_score(truth.numpy(), own.numpy()) if truth.any() else float("nan")
        for own, truth in zip(scores.T, targets.T, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def logits_of(backbone: Backbone, module: TaskModule, view: View, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits (n, C), float32, and targets, int64 (n,) or (n, C), of a whole split, on the CPU."""
    module.eval()
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    for images, target in inputs.batches(view, ordered_batches(len(view), EVAL_BATCH)):
        logits.append(forward_logits(backbone, module, images.to(backbone.device), view.preprocess).cpu())
        targets.append(target)
    return torch.cat(logits), torch.cat(targets)


@torch.no_grad()
def predict_all(
    backbone: Backbone, module: TaskModule, view: View, inputs: Inputs, temperatures: Sequence[float] = (1.0,)
) -> Answers | LabelAnswers:
    """Answer for every image of a split; of classes, of which there may be very many, the logits are not kept.

    Args:
        temperatures: that the logits are divided by, for the confidences.
    """
    if view.classes:
        logits, truths = logits_of(backbone, module, view, inputs)
        return LabelAnswers(torch.stack([torch.sigmoid(logits / value) for value in temperatures]), truths)
    module.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, targets in inputs.batches(view, ordered_batches(len(view), EVAL_BATCH)):
        logits = forward_logits(backbone, module, images.to(backbone.device), view.preprocess)
        confidences = torch.stack([(logits / value).softmax(1).max(1).values for value in temperatures])
        parts.append((logits.argmax(1).cpu(), targets, confidences.cpu()))
    predictions, classes, shares = zip(*parts, strict=True)
    return Answers(torch.cat(predictions), torch.cat(classes), torch.cat(shares, dim=1))
