"""What training ends with: the module is calibrated, learns what strangers are, and answers for unseen images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from gpt_serve.model.backbone import Backbone
from gpt_serve.train.answers import Answers, LabelAnswers, logits_of
from gpt_serve.train.calibration import calibrate
from gpt_serve.train.data.duplicates import Pair, duplicate_line
from gpt_serve.train.data.views import View, thinned
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Reporter, Views
from gpt_serve.train.label_errors import LabelError, label_error_line, probable_label_errors
from gpt_serve.train.loop import features_of
from gpt_serve.train.methods.modules import TaskModule
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.strangers import fit_unknown

MOST_IMAGES = 4000  # of a split whose features are looked at


@dataclass(frozen=True, eq=False)
class Conclusion:
    """What is known of a module that is done.

    Attributes:
        answers: for the images of ``split``, by the calibrated head.
        split: what the images are called that the answers are for.
        calibration: the record of it for the adapter's metadata; empty where nothing was left to calibrate with.
        duplicates: pairs of images of two splits that look the same.
        label_errors: images that are probably labelled wrong; None where nobody looked.
    """

    answers: Answers | LabelAnswers
    split: str
    calibration: dict[str, Any] = field(default_factory=dict)
    duplicates: tuple[Pair, ...] = ()
    label_errors: tuple[LabelError, ...] | None = None


def conclude(
    backbone: Backbone,
    module: TaskModule,
    views: Views,
    inputs: Inputs,
    reporter: Reporter,
    *,
    final_fit: bool = False,
    known: float = 1.0,
    refit: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> Conclusion:
    """Calibrate the module, let it learn what strangers are, and look for images that somebody should look at.

    Args:
        inputs: gives what ``module`` takes.
        final_fit: whether validation images were trained on: then there is nothing to calibrate and to measure with.
        known: the temperature that the head was calibrated with before.
        refit: fits the head to the validation images as well, see `calibrate`.
    """
    val = None if final_fit else views.val
    record, answers = calibrate(backbone, module, val, views.unseen, inputs, known, refit)
    errors = None
    if isinstance(module, AdapterModule):
        if views.val.classes:
            module.threshold = _thresholds(backbone, module, views, inputs, final_fit)
        train, val = (thinned(view, MOST_IMAGES) for view in (views.train.drawn("none"), views.val))
        rows = [_features(backbone, module, view, inputs) for view in (train, val)]
        module.unknown = None if final_fit else fit_unknown(*rows)
        if not views.val.classes:  # of which confident learning knows nothing
            errors = probable_label_errors(torch.cat(rows), [*train.samples, *val.samples], views.labels)
    if views.duplicates:
        reporter.notice(duplicate_line(views.duplicates))
    if errors:
        reporter.notice(label_error_line(errors))
    return Conclusion(answers, views.unseen[1], record, views.duplicates, errors)


def _thresholds(backbone: Backbone, module: AdapterModule, views: Views, inputs: Inputs, final_fit: bool) -> Tensor:
    """(C,) of the calibrated head; a half each where validation images were trained on."""
    if final_fit:
        return torch.full((len(views.labels),), 0.5)
    logits, targets = logits_of(backbone, module, views.val, inputs)
    return best_thresholds(torch.sigmoid(logits), targets)


def best_thresholds(scores: Tensor, targets: Tensor) -> Tensor:
    """float32 (C,): of each label the threshold with the best F1; a half for labels that no image has.

    Args:
        scores: (n, C) probabilities.
        targets: (n, C), 1 or 0.
    """
    found = []
    for own, truth in zip(scores.T, targets.T, strict=True):
        if not truth.any():
            found.append(0.5)
            continue
        precision, recall, thresholds = precision_recall_curve(truth.numpy(), own.numpy())
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        found.append(float(thresholds[f1[:-1].argmax()]))
    return torch.tensor(found)


def _features(backbone: Backbone, module: TaskModule, view: View, inputs: Inputs) -> Tensor:
    """float32 (n, K*D), on the CPU."""
    return torch.cat(list(features_of(backbone, module, view, inputs, lambda: None))).cpu()
