"""What a head reads and which block prompts enter: named by the user, or chosen on validation images.

On self-supervised backbones the best features do not lie after the last block. Which do is found without training: the
features of all candidates are computed once, and taps are added one by one while a classifier by linear discriminant
analysis (see `heads`) loses less on validation images. Prompts enter behind the block whose features are best alone:
what lies before makes them better as it is, and what lies behind is left to be mended.

Shapes: images ``n``, candidates ``T``, width ``D``.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import Trunk
from gpt_serve.specs import BackboneSpec, Tap
from gpt_serve.train.data.views import View, ordered_batches, thinned
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.loop import EVAL_BATCH

LAST, AUTO = "last", "auto"
MOST_TAPS = 6
MOST_IMAGES = 4000  # of a split that are looked at
SHRINKAGES = (0.1, 0.3, 0.6)
SCALES = tuple(2.0 ** (-step / 2) for step in range(17))
GAIN = 0.02  # by how much of itself one more tap must lower the loss
FLOOR = 1e-6  # of a feature's variance
_TAP = re.compile(r"(\d{1,4}):(cls|patches|mean)")


def parse_taps(text: str, spec: BackboneSpec) -> tuple[Tap, ...]:
    """Taps as ``--taps`` names them, such as ``11:cls,9:patches`` (blocks from 0); none for ``last`` and ``auto``.

    Raises:
        UsageError: it names none, the same twice, or what the backbone does not have.
    """
    if text in (LAST, AUTO):
        return ()
    taps = []
    for part in text.split(","):
        match = _TAP.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"--taps {text}: use last, auto, or blocks with a pooling such as 11:cls,9:patches")
        tap = Tap(int(match[1]), match[2])  # type: ignore[arg-type]
        if tap.block >= spec.depth:
            raise UsageError(f"--taps {part.strip()}: the backbone's last block is {spec.depth - 1}")
        if tap.pool == "mean" and tap.block != spec.depth - 1:
            raise UsageError(f"--taps {part.strip()}: mean counts prompts, after the last block only: use patches")
        taps.append(tap)
    if len(set(taps)) != len(taps):
        raise UsageError(f"--taps {text} names a tap twice")
    return tuple(taps)


def candidates(backbone: Backbone) -> tuple[Tap, ...]:
    """CLS token and patches of the second half of the blocks, what the pretraining calls for first."""
    spec = backbone.spec
    last = spec.depth - 1
    own = Tap(last, spec.pool)
    blocks = range(last, spec.depth // 2 - 1, -1)
    pools = ("cls", "patches") if backbone.model.has_class_token else ("patches",)
    others = [Tap(block, pool) for block in blocks for pool in pools]  # type: ignore[arg-type]
    same = Tap(last, "patches") if own.pool == "mean" else own  # without prompts
    return own, *(tap for tap in others if tap != same)


@dataclass(frozen=True)
class Choice:
    """What validation images prefer.

    Attributes:
        taps: at most `MOST_TAPS`; none for the backbone's own.
        first_block: the block that prompts should enter.
    """

    taps: tuple[Tap, ...] = ()
    first_block: int = 0


def choose(
    backbone: Backbone, train: View, val: View, classes: int, inputs: Inputs, on_image: Callable[[], object]
) -> Choice:
    """The taps with which the classifier loses least on ``val``, and the block behind the one with the best of them.

    Args:
        train: the training images; they are read without augmentation.
        inputs: gives what all `candidates` read.
        on_image: called after each image that is read; `images_read` says of how many.
    """
    taps = candidates(backbone)
    some, judged = thinned(train, MOST_IMAGES).drawn("none"), thinned(val, MOST_IMAGES)
    search = _Search.of(
        _features(some, taps, inputs, on_image),
        torch.tensor([sample.target for sample in some.samples]),
        _features(judged, taps, inputs, on_image),
        torch.tensor([sample.target for sample in judged.samples]),
        classes,
    )
    best = taps[min(range(len(taps)), key=lambda index: search.loss([index]))]
    chosen = search.greedy()
    own = chosen == [0]
    return Choice(
        taps=() if own else tuple(taps[index] for index in chosen),
        first_block=min(best.block + 1, backbone.spec.depth - 1),
    )


def images_read(train: View, val: View) -> int:
    """How many images `choose` reads."""
    return min(len(train), MOST_IMAGES) + min(len(val), MOST_IMAGES)


def _features(view: View, taps: Sequence[Tap], inputs: Inputs, on_image: Callable[[], object]) -> Tensor:
    """float32 (n, T, D) of the backbone alone."""
    rows = []
    for trunk, targets in inputs.batches(view, ordered_batches(len(view), EVAL_BATCH)):
        assert isinstance(trunk, Trunk)
        rows.append(torch.stack([trunk.tapped[tap] for tap in taps], dim=1))
        for _ in targets:
            on_image()
    return torch.cat(rows)


@dataclass(frozen=True)
class _Search:
    """Greedy forward selection among ``T`` candidates.

    Attributes:
        means: (C, T, D) of the training images, features at variance 1.
        within: (T*D, T*D) covariance within classes.
        rows: (n, T, D) validation images, likewise.
        targets: (n,) their classes.
        priors: (C,) logarithms of the classes' shares.
    """

    means: Tensor
    within: Tensor
    rows: Tensor
    targets: Tensor
    priors: Tensor

    @classmethod
    def of(cls, train: Tensor, train_targets: Tensor, val: Tensor, targets: Tensor, classes: int) -> "_Search":
        mean, scale = train.mean(0), (train.var(0, unbiased=False) + FLOOR).rsqrt()
        train, val = (train - mean) * scale, (val - mean) * scale
        counts = torch.bincount(train_targets, minlength=classes).clamp(min=1)
        means = train.new_zeros(classes, *train.shape[1:]).index_add_(0, train_targets, train)
        means = means / counts[:, None, None]
        rest = (train - means[train_targets]).flatten(1)
        return cls(means, rest.T @ rest / len(rest), val, targets, (counts / counts.sum()).log())

    def greedy(self) -> list[int]:
        """Indices of the taps, in the order in which they were added."""
        chosen: list[int] = []
        best = float("inf")
        while len(chosen) < min(MOST_TAPS, self.rows.shape[1]):
            left = [index for index in range(self.rows.shape[1]) if index not in chosen]
            losses = {index: self.loss([*chosen, index]) for index in left}
            added = min(losses, key=losses.__getitem__)
            if losses[added] > (1 - GAIN) * best:
                break
            best = losses[added]
            chosen.append(added)
        return chosen

    def loss(self, taps: Sequence[int]) -> float:
        """The least mean cross-entropy on the validation images, over shrinkages and scales."""
        index = list(taps)
        means, rows = self.means[:, index].flatten(1), self.rows[:, index].flatten(1)
        width = self.rows.shape[2]
        dims = torch.cat([torch.arange(tap * width, (tap + 1) * width) for tap in index])
        within = self.within[dims[:, None], dims]
        level = within.diagonal().mean().clamp(min=0.01)
        losses = []
        for shrinkage in SHRINKAGES:
            shrunk = (1 - shrinkage) * within + shrinkage * level * torch.eye(len(within))
            weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk)).T
            logits = rows @ weight.T - (means * weight).sum(1) / 2
            losses += [F.cross_entropy(scale * logits + self.priors, self.targets).item() for scale in SCALES]
        return min(losses)
