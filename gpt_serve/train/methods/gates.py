"""Hard gates: sampled with a straight-through gradient while training, exactly 0 or 1 afterwards.

Geng et al., "How Does Selective Mechanism Improve Self-Attention Networks?" (2020), and Jang et al., "Categorical
Reparameterization with Gumbel-Softmax" (2016), which Table 4 of the paper cites. Neither the paper nor its code says
which temperatures it used; these are Jang et al.'s.
"""

import torch
from torch import Tensor

FIRST_TEMPERATURE = 1.0
LAST_TEMPERATURE = 0.5


def gumbel_temperature(progress: float) -> float:
    """The temperature of sampled gates, which falls exponentially from 1 to 0.5.

    Args:
        progress: share of the epochs that are done, in [0, 1].
    """
    return float(FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** progress)


def sample_gates(gamma: Tensor, rows: int, temperature: float) -> Tensor:
    """Draw gates of 0 or 1 for each of ``rows`` images, (rows, L-1): 1 with probability ``sigmoid(gamma)``.

    The gradient is that of the relaxed gate ``sigmoid((gamma + logistic noise) / temperature)`` (straight-through).

    Args:
        gamma: (L-1,) gate priors; infinite ones give the same gate always.
        temperature: above 0; the lower, the closer the relaxed gate is to 0 or 1.
    """
    # The difference of two Gumbel variables is logistic.
    noise = torch.logit(torch.rand(rows, len(gamma), device=gamma.device), eps=1e-6)
    relaxed = torch.sigmoid((gamma + noise) / temperature)
    # In this order exactly 0 or 1: what is added is 0 in the forward pass.
    return (relaxed > 0.5).to(relaxed.dtype) + (relaxed - relaxed.detach())


def harden(gamma: Tensor) -> Tensor:
    """Replace gate priors by +-inf: their gates are exactly 1 where ``sigmoid(gamma) > 0.5`` and else 0."""
    return torch.full_like(gamma, -torch.inf).masked_fill(gamma > 0, torch.inf)
