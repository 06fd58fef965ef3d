"""Probabilities that mean what they say: of images answered with 80 %, 80 % are right.

The logits are divided by one temperature (Guo et al., On Calibration of Modern Neural Networks, ICML 2017), the one
with the least cross-entropy on the validation images, which nothing was fitted to. It is folded into the head: serving
and exported graphs know nothing of it, and no answer changes its order.

Shapes: images ``n``, classes ``C``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt_serve.model.backbone import Backbone
from gpt_serve.train.answers import Answers, LabelAnswers, logits_of, predict_all
from gpt_serve.train.data.views import View, thinned
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.methods.modules import TaskModule
from gpt_serve.train.objective import loss_sum, right_sum

BINS = 15
MOST_IMAGES = 4000  # that the temperature is fitted to
STEPS = 50  # of the optimizer; it needs about ten


def calibrate(
    backbone: Backbone,
    module: TaskModule,
    val: View | None,
    unseen: tuple[View, str],
    inputs: Inputs,
    known: float = 1.0,
    refit: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> tuple[dict[str, Any], Answers | LabelAnswers]:
    """Divide the module's head by the temperature that suits the validation images, and answer for ``unseen``.

    Args:
        val: images that nothing was fitted to; None leaves the head as it is.
        unseen: the images that the result is reported on, and what they are called.
        inputs: gives what ``module`` takes.
        known: a temperature that the head was divided by before, which this one takes the place of.
        refit: fits the head to the validation images as well; returns logits (n, C) of images that were left out in
            turn, and their classes (n,), which give the temperature instead.

    Returns:
        The record of it, for the adapter's metadata, empty without ``val``; and the answers of the calibrated head.
    """
    view, name = unseen
    if val is None:
        return {}, predict_all(backbone, module, view, inputs)
    logits, targets = logits_of(backbone, module, thinned(val, MOST_IMAGES), inputs) if refit is None else refit()
    temperature = fit_temperature(known * logits, targets)
    answers = predict_all(backbone, module, view, inputs, (1 / known, temperature / known))
    with torch.no_grad():
        module.head.weight.mul_(known / temperature)
        module.head.bias.mul_(known / temperature)
    before, after = (calibration_error(confidences, answers.right) for confidences in answers.confidences)
    record = {"temperature": temperature, "fitted_to": len(targets), "error_before": before, "error_after": after}
    return record | {"measured_on": len(view), "split": name}, answers


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The ``T`` for which ``logits / T`` have the least cross-entropy, see `objective`.

    Where all images are right it is 1: they would ask for certainty, which so few of them cannot give.

    Args:
        logits: (n, C).
        targets: (n,) classes, or (n, C) labels.
    """
    if right_sum(logits, targets) == len(targets):
        return 1.0
    values = logits.double()
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        return loss_sum(values / log.exp(), targets) / len(targets)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    before = loss().item()
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = log.exp().item()
    return found if math.isfinite(found) and found > 0 and loss().item() <= before else 1.0


def calibration_error(confidences: Tensor, right: Tensor) -> float:
    """Expected calibration error: over `BINS` equal bins of confidence, ``sum |accuracy - confidence| * n_bin / n``.

    Args:
        confidences: (n,) probabilities of the predicted classes, or of any labels.
        right: (n,) bool, whether these are the true ones.
    """
    place = (confidences * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64)
    gaps.index_add_(0, place, right.double() - confidences.double())
    return gaps.abs().sum().item() / len(confidences)
