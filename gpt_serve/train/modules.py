"""What a training loop fits: the interface that adapters and full fine-tuning share, and the head."""

import math
from typing import Literal

from torch import Tensor, nn

from gpt_serve.errors import BackboneError
from gpt_serve.prompted import final_norm

HEAD_BIAS = -math.log(99.0)
HEAD_STD = {"small": 0.02, "tiny": 0.01}

HeadInit = Literal["kaiming", "small", "tiny"]
Norm = Literal["pretrained", "fresh"]


class TaskModule(nn.Module):
    """Everything that is trained for one task.

    Attributes:
        head: (C, D) and (C,), the linear classifier.
    """

    head: nn.Linear

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, C); ``model`` is the frozen backbone."""
        raise NotImplementedError

    def steering(self) -> list[nn.Parameter]:
        """What is learned besides the head."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("head.")]

    def anneal(self, progress: float) -> None:
        """Called before each epoch; ``progress`` is the share of the epochs that are done, in [0, 1]."""

    def clamp(self) -> None:
        """Called after each optimizer step."""


def make_head(width: int, classes: int, kind: HeadInit) -> nn.Linear:
    """An untrained classifier: Kaiming-normal (fan-out) with biases of -ln 99, or truncated normal with biases of 0."""
    head = nn.Linear(width, classes)
    if kind == "kaiming":
        nn.init.kaiming_normal_(head.weight, a=0, mode="fan_out")
        nn.init.constant_(head.bias, HEAD_BIAS)
    else:
        nn.init.trunc_normal_(head.weight, std=HEAD_STD[kind])
        nn.init.zeros_(head.bias)
    return head


class FreshNorm(nn.Module):
    """What turns the output of the backbone's pretrained norm into that of a new, frozen one.

    A new LayerNorm has weight 1 and bias 0, so the two differ by the pretrained weight ``w`` and bias ``b``:
    ``fresh = (pretrained - b) / w``. As this is linear, a head that was trained behind it can be stored as one behind
    the pretrained norm, and serving needs to know nothing of it.

    Raises:
        BackboneError: the backbone has no final norm, or one with a weight of 0.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        norm = final_norm(model)
        if not isinstance(norm, nn.LayerNorm):
            raise BackboneError("--norm fresh: the backbone has no final LayerNorm: leave it out")
        if norm.weight.eq(0).any():
            raise BackboneError("--norm fresh: the backbone's final norm has weights of 0: leave it out")
        self.register_buffer("weight", norm.weight.detach().clone(), persistent=False)
        self.register_buffer("bias", norm.bias.detach().clone(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) behind the pretrained norm -> (B, D) behind a fresh one."""
        return (features - self.bias) / self.weight

    def folded(self, head: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) of the head that gives the same behind the pretrained norm."""
        weight = head.weight / self.weight
        return weight, head.bias - weight @ self.bias
