"""What a training loop fits: the interface that adapters and full fine-tuning share, and the head."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from gpt_serve.errors import BackboneError
from gpt_serve.model.prompted import final_norm

HEAD_BIAS = -math.log(99.0)
HEAD_STD = {"small": 0.02, "tiny": 0.01}

HeadInit = Literal["kaiming", "small", "tiny", "lda"]
Norm = Literal["pretrained", "fresh", "standard"]
VARIANCE_FLOOR = 1e-6  # of features that hardly vary


class TaskModule(nn.Module):
    """Everything that is trained for one task.

    Attributes:
        head: (C, D) and (C,), the linear classifier.
        head_norm: before it; None for none.
    """

    head: nn.Linear
    head_norm: "HeadNorm | None"

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to what the backbone's norm puts out, (B, D); ``model`` is the frozen one."""
        raise NotImplementedError

    def seen(self, features: Tensor) -> Tensor:
        """What the head sees of ``features``, (B, D) both."""
        return features if self.head_norm is None else self.head_norm(features)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, C)."""
        logits: Tensor = self.head(self.seen(self.features(model, images)))
        return logits

    def steering(self) -> list[nn.Parameter]:
        """What is learned besides the head."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("head.")]

    def anneal(self, progress: float) -> None:
        """Called before each epoch; ``progress`` is the share of the epochs that are done, in [0, 1]."""

    def clamp(self) -> None:
        """Called after each optimizer step."""


def make_head(width: int, classes: int, kind: HeadInit) -> nn.Linear:
    """An untrained classifier: Kaiming-normal (fan-out) with biases of -ln 99, or truncated normal with biases of 0.

    One by discriminant analysis is 0 until there are features, see `lda_head`.
    """
    head = nn.Linear(width, classes)
    if kind == "kaiming":
        nn.init.kaiming_normal_(head.weight, a=0, mode="fan_out")
        nn.init.constant_(head.bias, HEAD_BIAS)
    else:
        nn.init.zeros_(head.bias)
        if kind == "lda":
            nn.init.zeros_(head.weight)
        else:
            nn.init.trunc_normal_(head.weight, std=HEAD_STD[kind])
    return head


class HeadNorm(nn.Module):
    """What the head sees instead of the features: ``(features - shift) * scale``, which stays as it is while training.

    As this is linear, a head that was trained behind it can be stored as one without, and serving needs to know
    nothing of it. ``fresh`` undoes the weight ``w`` and bias ``b`` of the backbone's final LayerNorm, so that the head
    sees what a new one would give: ``(features - b) / w``. ``standard`` gives every feature mean 0 and variance 1 over
    the training images, as the batch norm of MAE's linear probes does (He et al. 2022, A.1).

    Args:
        width: ``D``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return (features - self.shift) * self.scale

    def folded(self, head: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) of the head that gives the same on the features themselves."""
        weight = head.weight * self.scale
        return weight, head.bias - weight @ self.shift

    @torch.no_grad()
    def set_fresh(self, model: nn.Module) -> None:
        """Undo the final norm of ``model``.

        Raises:
            BackboneError: it has none, or one with a weight of 0.
        """
        norm = final_norm(model)
        if not isinstance(norm, nn.LayerNorm):
            raise BackboneError("--norm fresh: the backbone has no final LayerNorm: leave it out")
        if norm.weight.eq(0).any():
            raise BackboneError("--norm fresh: the backbone's final norm has weights of 0: leave it out")
        self.shift.copy_(norm.bias)
        self.scale.copy_(1 / norm.weight)

    @torch.no_grad()
    def set_standard(self, batches: Iterable[Tensor]) -> None:
        """Standardise by the mean and variance over all rows of ``batches``, (B, D) each."""
        count, total, squares = 0, self.shift.double().zero_(), self.shift.double().zero_()
        for features in batches:
            rows = features.double()
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
        mean = total / count
        self.shift.copy_(mean)
        self.scale.copy_((squares / count - mean.square() + VARIANCE_FLOOR).rsqrt())
