"""What training minimises, and counts as right, where images have one label or several.

Shapes: batch ``B``, classes ``C``; targets are int64 (B,) classes, or (B, C) with 1 for each label of an image.
"""

from torch import Tensor
from torch.nn import functional as F


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of logits (B, C): of classes, or over all labels of "has it" and "has it not"."""
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")


def right_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images are right; where they have several labels each counts by the share of labels that are."""
    if targets.ndim == 1:
        return (logits.argmax(1) == targets).sum()
    return ((logits > 0) == (targets > 0)).double().mean(1).sum()
