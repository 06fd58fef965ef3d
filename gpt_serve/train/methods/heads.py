"""The linear head: how it starts, the norm before it, and the one that linear discriminant analysis gives.

With ``--head-init lda`` training starts from the latter. Classes are taken for Gaussians of one covariance, so the
posterior is linear in the features (Fisher 1936; Hastie, Tibshirani, Friedman, The Elements of Statistical Learning,
4.3). With ``z`` the features at variance 1, ``m_c`` the mean of class ``c``, ``pi_c`` its share of the images and ``S``
the covariance within classes:

    S'      = (1 - shrinkage) S + shrinkage tr(S) / D I
    logit_c = scale (m_c S'^-1 z - m_c S'^-1 m_c / 2) + ln pi_c

A few images a class make ``S`` and the means look better than they are. How much both are to be trusted is settled by
images that are left out: `FOLDS`-fold, without a look at validation images.

Shapes: images ``n``, classes ``C``, width ``D``.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.errors import BackboneError
from gpt_serve.model.vit import ViT
from gpt_serve.train.data.samples import rank_in_class

HEAD_BIAS = -math.log(99.0)
HEAD_STD = {"small": 0.02, "tiny": 0.01}

HeadInit = Literal["kaiming", "small", "tiny", "lda"]
Norm = Literal["pretrained", "fresh", "standard"]
VARIANCE_FLOOR = 1e-6  # of features that hardly vary

FOLDS = 5
TENTHS = 10
NEAREST_MEAN = 1.0  # the shrinkage that leaves nothing of the covariance but its level
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, NEAREST_MEAN)
SCALES = tuple(2.0**-power for power in range(9))
LEAST_LEVEL = 0.01  # of the variance within classes; features vary by 1
ALIKE = 1e-3  # losses that differ by less say nothing: of such settings the least sure is taken


def make_head(width: int, classes: int, kind: HeadInit) -> nn.Linear:
    """Make an untrained classifier: Kaiming-normal (fan-out) with biases of -ln 99, or truncated normal without.

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
    """A norm between features and head that training leaves alone: the head sees ``(features - shift) * scale``.

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
        """Apply the norm to features (B, D)."""
        return (features - self.shift) * self.scale

    def folded(self, head: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) of a head that gives without the norm what ``head`` gives behind it."""
        weight = head.weight * self.scale
        return weight, head.bias - weight @ self.shift

    @torch.no_grad()
    def set_fresh(self, model: ViT) -> None:
        """Undo the final norm of ``model``.

        Raises:
            BackboneError: it has none, or one with a weight of 0.
        """
        norm = model.final_norm
        if not isinstance(norm, nn.LayerNorm):
            raise BackboneError("--norm fresh: the backbone has no final LayerNorm: leave it out")
        if norm.weight.eq(0).any():
            raise BackboneError("--norm fresh: the backbone's final norm has weights of 0: leave it out")
        taps = len(self.shift) // len(norm.weight)
        self.shift.copy_(norm.bias.repeat(taps))
        self.scale.copy_((1 / norm.weight).repeat(taps))

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


@dataclass(frozen=True)
class Discriminant:
    """Class means (C, D) and the spectrum of the covariance within classes, (R,) values and (D, R) vectors.

    ``R`` is ``D``, or as many as there are images where they are fewer: in all other directions nothing varies.
    """

    means: Tensor
    present: Tensor  # (C,): classes with images
    values: Tensor
    vectors: Tensor

    @classmethod
    def fit(cls, rows: Tensor, targets: Tensor, classes: int) -> "Discriminant":
        """Estimate both from centred features (n, D) and their classes (n,)."""
        counts = torch.bincount(targets, minlength=classes)
        sums = rows.new_zeros(classes, rows.shape[1]).index_add_(0, targets, rows)
        means = sums / counts.clamp(min=1)[:, None]
        within = rows - means[targets]
        if counts.max() == 1:  # nothing is known of how a class varies, but features do by 1
            values, vectors = rows.new_ones(rows.shape[1]), torch.eye(rows.shape[1], dtype=rows.dtype)
        elif len(rows) < rows.shape[1]:
            values, vectors = _spectrum_of_few(within)
        else:
            values, vectors = torch.linalg.eigh(within.T @ within / len(rows))
        return cls(means, counts > 0, values.clamp(min=0), vectors)

    def head(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) without priors; the bias of classes without images is -inf."""
        level = (self.values.sum() / self.means.shape[1]).clamp(min=LEAST_LEVEL)
        spectrum = (1 - shrinkage) * self.values + shrinkage * level
        rest = 1 / (shrinkage * level)  # the inverse where nothing varies
        weight = (self.means @ self.vectors * (1 / spectrum - rest)) @ self.vectors.T + self.means * rest
        bias = -(self.means * weight).sum(1) / 2
        return weight, bias.masked_fill(~self.present, -torch.inf)


def _spectrum_of_few(within: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and vectors (D, n) of ``within.T @ within / n`` for fewer rows than columns, by the rows' own.

    Much less work: the matrix that is decomposed is (n, n). Directions in which rounding is all that varies count as
    directions in which nothing does.
    """
    squares, left = torch.linalg.eigh(within @ within.T)
    real = squares > squares.max() * 1e-10
    vectors = within.T @ left[:, real] / squares[real].sqrt()
    return squares[real] / len(within), vectors


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


def left_out_logits(features: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Logits (n, C) of each image as it is, by `lda_head` without it: with a tenth of each class left out in turn.

    Shrinkage and scale are those of all images, which leaving an image out hardly changes. A class needs two images.

    Args:
        features: of ``V`` views of each image, (V, n, D), the first of them as it is; they are left out together.
    """
    count = len(targets)
    parts = torch.from_numpy(rank_in_class(targets.numpy()))
    every, again = targets.repeat(len(features)), parts.repeat(len(features))
    rows = features.flatten(0, 1).double()
    rows = (rows - rows.mean(0)) * (rows.var(0, unbiased=False) + VARIANCE_FLOOR).rsqrt()
    counts = torch.bincount(every, minlength=classes).clamp(min=1)
    priors = (counts / counts.sum()).log()
    shrinkage, scale = _settle(rows, every, again % FOLDS, priors)
    logits = rows.new_empty(count, classes)
    for part in range(TENTHS):
        kept = again % TENTHS != part
        weight, bias = Discriminant.fit(rows[kept], every[kept], classes).head(shrinkage)
        judged = parts % TENTHS == part
        logits[judged] = scale * (rows[:count][judged] @ weight.T + bias.masked_fill(bias.isinf(), 0.0)) + priors
    return logits.float()


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
