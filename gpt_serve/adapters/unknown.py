"""What tells images of a task from strangers: the distance from everything that the task was trained on.

The features that the head reads are taken for Gaussian with a few directions of their own variance and one variance
for all others (probabilistic principal components: Tipping and Bishop, 1999). No class plays a part. The distance is
Mahalanobis': with ``x`` the features (K*D,),

    distance(x) = |scale (x - mean)|^2 - |basis (x - mean)|^2

The further out, the fewer validation images lay as far: their share is what an answer says of the image.

Shapes: taps ``K``, width ``D``, directions ``R``, knots ``Q``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

LEAST_KNOWN = 0.05
"""Where fewer of the validation images lie as far out, an image is a stranger's: 95 % of them are not."""
DIGITS = 4  # of the share that answers give
PREFIX = "unknown."  # of the tensors' names in an adapter file
MEASURES = ("unknown.mean", "unknown.scale", "unknown.basis")
"""The tensors that the distance takes, in this order."""


@dataclass(frozen=True, eq=False)
class Unknown:
    """What the distance is computed with, float32 on the CPU.

    Attributes:
        mean: (K*D,) of the training images.
        scale: (K*D,), one over the standard deviation in all but the directions of ``basis``.
        basis: (R, K*D), what these directions have less than that.
        knots: (Q,) distances in ascending order: equidistant quantiles of those of the validation images.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    knots: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Unknown | None":
        """That of an adapter file's tensors, by their names there; None where there is none."""
        parts = {field.name: tensors.get(PREFIX + field.name) for field in fields(cls)}
        return cls(**parts) if all(part is not None for part in parts.values()) else None  # type: ignore[arg-type]

    def measures(self) -> dict[str, Tensor]:
        """What the distance takes, by the names in an adapter file."""
        return {name: tensor for name, tensor in self.tensors().items() if name in MEASURES}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in an adapter file."""
        return {PREFIX + field.name: getattr(self, field.name) for field in fields(self)}


def known_share(knots: Tensor, distances: Tensor) -> Tensor:
    """The share of validation images that lie at least as far out, (B,) in [0, 1].

    Args:
        knots: (Q,) in ascending order.
        distances: (B,); one that is no number is further out than all.
    """
    return (knots >= distances[:, None]).float().mean(dim=1)
