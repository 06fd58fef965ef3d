"""What tells strangers is fitted to training images, and its threshold to validation images; see `adapters.unknown`.

Shapes: images ``n``, taps ``K``, width ``D``, directions ``R``, knots ``Q``.
"""

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from gpt_serve.adapters.unknown import Unknown
from gpt_serve.model.heads import stranger_distance
from gpt_serve.train.methods.heads import VARIANCE_FLOOR

DIRECTIONS = 32
EACH = 8  # images at least for each direction: fewer make the noise in all others look smaller than it is
KNOTS = 100
ROUNDING = 1e-4
LEAST_NOISE = 1e-3  # variance in all other directions, of features at variance 1


def fit_unknown(train: Tensor, val: Tensor) -> Unknown:
    """What tells images like those of ``train`` from strangers, with ``val``, which nothing was fitted to, as measure.

    Args:
        train: float32 (n, K*D), features as the head reads them.
        val: likewise, of other images.
    """
    mean, scale, basis = gaussian(train)
    distances = stranger_distance(val, mean, scale, basis)
    return Unknown(mean, scale, basis, knots_of(distances))


def knots_of(distances: Tensor) -> Tensor:
    """(Q,) equidistant quantiles of distances (n,), so that of each image itself at least as many lie as far out.

    They lie a little further out than the images, so that rounding elsewhere makes no difference.
    """
    quantiles = distances.quantile((torch.arange(KNOTS) + 0.5) / KNOTS, interpolation="higher")
    return quantiles + ROUNDING * quantiles.abs()


def gaussian(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (K*D,), scale (K*D,) and basis (R, K*D), float32, of `adapters.unknown` for features (n, K*D).

    Features are brought to variance 1 first. With ``lambda_r`` the variances in the ``R`` first principal directions
    ``v_r`` and ``sigma^2`` the mean variance in all others, the distance is that of the covariance
    ``sum (lambda_r - sigma^2) v_r v_r^T + sigma^2 I``.
    """
    rows = features.double()
    mean, inverse = rows.mean(0), (rows.var(0, unbiased=False) + VARIANCE_FLOOR).rsqrt()
    rows = (rows - mean) * inverse
    count, width = rows.shape
    directions = max(1, min(DIRECTIONS, count // EACH, width - 1))
    with np.errstate(invalid="ignore"):  # of images that are all alike: a share of no variance, which nobody reads
        found = PCA(directions, random_state=0).fit(rows.numpy())  # type: ignore[no-untyped-call]
    variances, axes = (torch.from_numpy(part) for part in (found.explained_variance_, found.components_))
    total = rows.var(0, unbiased=True).sum()
    noise = ((total - variances.sum()) / (width - len(variances))).clamp(min=LEAST_NOISE)
    weights = (1 / noise - 1 / variances.clamp(min=LEAST_NOISE)).clamp(min=0)
    basis = weights.sqrt()[:, None] * axes * inverse
    return mean.float(), (inverse * noise.rsqrt()).float(), basis.float()
