"""Heads: from the features of the taps to what a task answers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.specs import Tap


def linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (B, C) of a linear classifier.

    Args:
        features: (B, K*D), the taps side by side.
        weight: (C, K*D).
        bias: (C,).
    """
    return F.linear(features, weight, bias)


def read_taps(tapped: Sequence[Tensor], taps: Sequence[Tap], wanted: Sequence[Tap], rows: Tensor | slice) -> Tensor:
    """The features (R, K*D) that the head of some rows reads, of those that a pass made.

    Args:
        tapped: for each of ``taps`` (B, D), from `prompted.tapped_features`.
        wanted: the head's taps, ``K`` of ``taps``.
        rows: which of the ``B`` rows, ``R`` of them.
    """
    return torch.cat([tapped[taps.index(tap)][rows] for tap in wanted], dim=-1)
