"""The head that linear discriminant analysis gives: where training starts with ``--head-init lda``.

Classes are taken for Gaussians of one covariance, so the posterior is linear in the features (Fisher 1936; Hastie,
Tibshirani, Friedman, The Elements of Statistical Learning, 4.3). With ``z`` the features at variance 1, ``m_c`` the
mean of class ``c``, ``pi_c`` its share of the images and ``S`` the covariance within classes:

    S'      = (1 - shrinkage) S + shrinkage tr(S) / D I
    logit_c = scale (m_c S'^-1 z - m_c S'^-1 m_c / 2) + ln pi_c

A few images a class make ``S`` and the means look better than they are. How much both are to be trusted is settled by
images that are left out: `FOLDS`-fold, without a look at validation images.

Shapes: images ``n``, classes ``C``, width ``D``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDS = 5
SHRINKAGES = (0.01, 0.03, 0.1, 0.3)
SCALES = tuple(2.0**-power for power in range(9))
VARIANCE_FLOOR = 1e-6  # of features that hardly vary


@dataclass(frozen=True)
class Discriminant:
    """Logits without priors: (D, C) and (C,); those of classes without images are -inf."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, rows: Tensor, targets: Tensor, classes: int, shrinkage: float) -> "Discriminant":
        """From features (n, D) around 0 and their classes (n,)."""
        counts = torch.bincount(targets, minlength=classes)
        sums = rows.new_zeros(classes, rows.shape[1]).index_add_(0, targets, rows)
        means = sums / counts.clamp(min=1)[:, None]
        within = rows - means[targets]
        covariance = within.T @ within / len(rows)
        eye = torch.eye(rows.shape[1], dtype=rows.dtype)
        level = covariance.trace() / len(eye)
        if level == 0:  # one image a class is left: nothing is known of how a class varies, but features do by 1
            level = level.new_ones(())
        weight = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * level * eye, means.T)
        bias = -(means * weight.T).sum(1) / 2
        return cls(weight, bias.masked_fill(counts == 0, -torch.inf))

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, D) to logits (n, C)."""
        return rows @ self.weight + self.bias


def lda_head(features: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    """Weight (C, D) and bias (C,), float32, of the head for features (n, D) of classes (n,), on the CPU.

    Returns:
        None when no class has two images: nothing is known of how a class varies.
    """
    rows = features.double()
    mean, variance = rows.mean(0), rows.var(0, unbiased=False)
    inverse = (variance + VARIANCE_FLOOR).rsqrt()
    rows = (rows - mean) * inverse
    counts = torch.bincount(targets, minlength=classes)
    if counts.max() < 2:
        return None
    priors = (counts.clamp(min=1) / counts.clamp(min=1).sum()).log()
    shrinkage, scale = _settle(rows, targets, classes, priors)
    found = Discriminant.fit(rows, targets, classes, shrinkage)
    weight = scale * found.weight.T * inverse
    bias = scale * found.bias.masked_fill(found.bias.isinf(), 0.0) + priors - weight @ mean
    return weight.float(), bias.float()


def _settle(rows: Tensor, targets: Tensor, classes: int, priors: Tensor) -> tuple[float, float]:
    """The shrinkage and the scale with the least cross-entropy on images that are left out."""
    folds = _rank_in_class(targets, classes) % FOLDS
    losses: dict[tuple[float, float], float] = {}
    for shrinkage in SHRINKAGES:
        logits = rows.new_zeros(len(rows), classes)
        for fold in range(min(FOLDS, int(folds.max()) + 1)):
            kept = folds != fold
            found = Discriminant.fit(rows[kept], targets[kept], classes, shrinkage)
            logits[~kept] = found(rows[~kept])
        known = logits.gather(1, targets[:, None])[:, 0].isfinite()
        for scale in SCALES:
            scaled = scale * logits[known] + priors
            losses[shrinkage, scale] = F.cross_entropy(scaled, targets[known]).item()
    return min(losses, key=losses.__getitem__)


def _rank_in_class(targets: Tensor, classes: int) -> Tensor:
    """(n,): how many images of its class come before each."""
    before = F.one_hot(targets, classes).cumsum(0).gather(1, targets[:, None])[:, 0]
    return before - 1
