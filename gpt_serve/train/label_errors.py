"""Images that are probably labelled wrong, as confident learning has it (Northcutt, Jiang, Chuang, JAIR 2021).

``cleanlab`` finds them, which is an extra, from probabilities of classifiers that have not seen the image: discriminant
analysis of the features that the head reads, on four fifths of the images for the fifth.

Shapes: images ``n``, classes ``C``, taps ``K``, width ``D``.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from gpt_serve.train.calibration import fit_temperature
from gpt_serve.train.data.samples import Split, counted, rank_in_class, short_name
from gpt_serve.train.methods.heads import FOLDS, VARIANCE_FLOOR, Discriminant

SHRINKAGE = 0.3
SHOWN = 5  # in a warning
HINT = "Probable label errors are listed where `cleanlab` is installed: `pip install 'gpt-serve[labels]'`."


@dataclass(frozen=True)
class LabelError:
    """An image that is probably labelled wrong.

    Attributes:
        name: of the image.
        given: its label.
        suggested: the label that others of its kind have.
    """

    name: str
    given: str
    suggested: str


def probable_label_errors(features: Tensor, samples: Split, labels: tuple[str, ...]) -> tuple[LabelError, ...] | None:
    """The images that are probably labelled wrong, the most probable first; None without ``cleanlab``.

    Args:
        features: float32 (n, K*D) of ``samples``, on the CPU.
    """
    if find_spec("cleanlab") is None:
        return None
    targets = torch.tensor([sample.target for sample in samples])
    judged = torch.bincount(targets, minlength=len(labels))[targets] > 1  # of a class's only image nothing is known
    present, positions = torch.unique(targets[judged], return_inverse=True)
    if len(present) < 2:
        return ()
    from cleanlab.filter import find_label_issues  # takes a second

    probabilities = left_out_probabilities(features, targets, len(labels))
    among = probabilities[judged][:, present]
    found = find_label_issues(
        positions.numpy(),
        (among / among.sum(dim=1, keepdim=True)).numpy(),
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    places = judged.nonzero()[:, 0][torch.from_numpy(found)].tolist()
    best = probabilities.argmax(dim=1)
    return tuple(
        LabelError(short_name(samples[place].name), labels[samples[place].target], labels[int(best[place])])
        for place in places
        if best[place] != targets[place]
    )


def left_out_probabilities(features: Tensor, targets: Tensor, classes: int) -> Tensor:
    """float64 (n, C), of each image by a classifier of the other folds' images."""
    rows = features.double()
    rows = (rows - rows.mean(0)) * (rows.var(0, unbiased=False) + VARIANCE_FLOOR).rsqrt()
    folds = torch.from_numpy(rank_in_class(targets.numpy()) % FOLDS)
    logits = rows.new_zeros(len(rows), classes)
    for fold in range(FOLDS):
        out = folds == fold
        if out.any() and not out.all():
            weight, bias = Discriminant.fit(rows[~out], targets[~out], classes).head(SHRINKAGE)
            logits[out] = rows[out] @ weight.T + bias.clamp(min=-1e9)
    known = torch.bincount(targets, minlength=classes)[targets] > 1
    return (logits / fit_temperature(logits[known], targets[known])).softmax(dim=1)


def label_error_line(errors: tuple[LabelError, ...]) -> str:
    """A warning of one line about ``errors``, at least one."""
    shown = ", ".join(f"{error.name} ({error.given}, perhaps {error.suggested})" for error in errors[:SHOWN])
    more = f" and {len(errors) - SHOWN} more, in the card" if len(errors) > SHOWN else ""
    return f"{counted(len(errors), 'image')} may be labelled wrong: {shown}{more}"
