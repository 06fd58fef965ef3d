"""The head of a task with several labels an image that training starts from: logistic regression of each label.

Features are brought to variance 1. How strongly weights are held back is settled by a fifth of the images, which are
left out for that.

Shapes: images ``n``, classes ``C``, width ``D``.
"""

import torch
from torch import Tensor

from gpt_serve.train.methods.heads import FOLDS, VARIANCE_FLOOR
from gpt_serve.train.objective import loss_sum

PENALTIES = (1e-3, 1e-2, 1e-1)  # of half the squared weights, beside the mean loss of an image
STEPS = 60  # of the optimizer


def logistic_head(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,), float32, of the head for features (V, n, D) of images with labels (n, C).

    Args:
        features: of ``V`` views of each image, on the CPU; they count alike, and are left out together.
        targets: 1 for each label of an image, and 0.
    """
    left_out = (torch.arange(len(targets)) % FOLDS == 0).repeat(len(features))
    rows, labels = features.flatten(0, 1), targets.repeat(len(features), 1)
    mean, inverse = rows.mean(0), (rows.var(0, unbiased=False) + VARIANCE_FLOOR).rsqrt()
    rows = (rows - mean) * inverse
    penalty = PENALTIES[-1]
    if not left_out.all():
        losses = {
            value: _loss_of(_fit(rows[~left_out], labels[~left_out], value), rows[left_out], labels[left_out])
            for value in PENALTIES
        }
        penalty = min(losses, key=losses.__getitem__)
    weight, bias = _fit(rows, labels, penalty)
    weight = weight * inverse
    return weight, bias - weight @ mean


def _fit(rows: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) with the least mean loss of an image and ``penalty``; the bias begins at the odds."""
    shares = (labels.sum(0) + 1) / (len(labels) + 2)
    weight = torch.zeros(labels.shape[1], rows.shape[1], requires_grad=True)
    bias = torch.logit(shares.float()).requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_sum(rows @ weight.T + bias, labels) / len(rows) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _loss_of(head: tuple[Tensor, Tensor], rows: Tensor, labels: Tensor) -> float:
    weight, bias = head
    return loss_sum(rows @ weight.T + bias, labels).item()
