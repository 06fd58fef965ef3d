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

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.train.data.samples import rank_in_class
from gpt_serve.train.methods.modules import VARIANCE_FLOOR

FOLDS = 5
NEAREST_MEAN = 1.0  # the shrinkage that leaves nothing of the covariance but its level
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, NEAREST_MEAN)
SCALES = tuple(2.0**-power for power in range(9))
LEAST_LEVEL = 0.01  # of the variance within classes; features vary by 1
ALIKE = 1e-3  # losses that differ by less say nothing: of such settings the least sure is taken


@dataclass(frozen=True)
class Discriminant:
    """Class means (C, D) and the spectrum of the covariance within classes, (D,) values and (D, D) vectors."""

    means: Tensor
    present: Tensor  # (C,): classes with images
    values: Tensor
    vectors: Tensor

    @classmethod
    def fit(cls, rows: Tensor, targets: Tensor, classes: int) -> "Discriminant":
        """From features (n, D) around 0 and their classes (n,)."""
        counts = torch.bincount(targets, minlength=classes)
        sums = rows.new_zeros(classes, rows.shape[1]).index_add_(0, targets, rows)
        means = sums / counts.clamp(min=1)[:, None]
        within = rows - means[targets]
        values, vectors = torch.linalg.eigh(within.T @ within / len(rows))
        if counts.max() == 1:  # nothing is known of how a class varies, but features do by 1
            values = torch.ones_like(values)
        return cls(means, counts > 0, values.clamp(min=0), vectors)

    def head(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) without priors; the bias of classes without images is -inf."""
        level = self.values.mean().clamp(min=LEAST_LEVEL)
        spectrum = (1 - shrinkage) * self.values + shrinkage * level
        weight = (self.means @ self.vectors / spectrum) @ self.vectors.T
        bias = -(self.means * weight).sum(1) / 2
        return weight, bias.masked_fill(~self.present, -torch.inf)


def lda_head(features: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,), float32, of the head for features (V, n, D) of images of classes (n,), on the CPU.

    With one image of each class it is the nearest mean at the least scale. A class without images keeps a weight of 0.

    Args:
        features: of ``V`` views of each image; they count alike, and are left out together.
    """
    folds = torch.from_numpy(rank_in_class(targets.numpy()) % FOLDS).repeat(len(features))
    targets = targets.repeat(len(features))
    rows = features.flatten(0, 1).double()
    mean, variance = rows.mean(0), rows.var(0, unbiased=False)
    inverse = (variance + VARIANCE_FLOOR).rsqrt()
    rows = (rows - mean) * inverse
    counts = torch.bincount(targets, minlength=classes).clamp(min=1)
    priors = (counts / counts.sum()).log()
    shrinkage, scale = _settle(rows, targets, folds, priors)
    weight, bias = Discriminant.fit(rows, targets, classes).head(shrinkage)
    weight = scale * weight * inverse
    bias = scale * bias.masked_fill(bias.isinf(), 0.0) + priors - weight @ mean
    return weight.float(), bias.float()


def _settle(rows: Tensor, targets: Tensor, folds: Tensor, priors: Tensor) -> tuple[float, float]:
    """The shrinkage and the scale with the least cross-entropy on images that are left out."""
    losses = _left_out(rows, targets, folds, priors)
    if not losses:
        return NEAREST_MEAN, SCALES[-1]
    enough = min(losses.values()) + ALIKE
    alike = [setting for setting, loss in losses.items() if loss <= enough]
    return max(alike, key=lambda setting: (setting[0], -setting[1]))


def _left_out(rows: Tensor, targets: Tensor, folds: Tensor, priors: Tensor) -> dict[tuple[float, float], float]:
    """Mean cross-entropy of images that were left out, by (shrinkage, scale); without classes' only images.

    Where no class keeps two images there is no covariance to shrink: all give the nearest mean.
    """
    losses: defaultdict[tuple[float, float], float] = defaultdict(float)
    judged_in_all = 0
    for fold in range(FOLDS):
        kept = folds != fold
        judged = ~kept & torch.isin(targets, targets[kept])
        if not judged.any():
            continue
        judged_in_all += int(judged.sum())
        found = Discriminant.fit(rows[kept], targets[kept], len(priors))
        for shrinkage in SHRINKAGES:
            weight, bias = found.head(shrinkage)
            logits = rows[judged] @ weight.T + bias
            for scale in SCALES:
                losses[shrinkage, scale] += F.cross_entropy(
                    scale * logits + priors, targets[judged], reduction="sum"
                ).item()
    return {setting: loss / judged_in_all for setting, loss in losses.items()}
