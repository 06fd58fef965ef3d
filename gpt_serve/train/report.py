"""What the model card tells of each class, of the pairs that are confused, and of the images themselves."""

from collections.abc import Sequence

import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from gpt_serve.train.answers import Answers, LabelAnswers
from gpt_serve.train.data.duplicates import Pair
from gpt_serve.train.label_errors import HINT, LabelError

MOST_ROWS = 120  # classes with a row of their own: those with the lowest F1, where there are more
MOST_PAIRS = 10
MOST_NAMES = 50


def report(answers: Answers | LabelAnswers, labels: Sequence[str], split: str, thresholds: Tensor | None) -> list[str]:
    """What is told of each class, or of each label of a task with several, as Markdown."""
    if isinstance(answers, Answers):
        return class_report(answers, labels, split)
    assert thresholds is not None
    return label_report(answers, labels, split, thresholds)


def label_report(answers: LabelAnswers, labels: Sequence[str], split: str, thresholds: Tensor) -> list[str]:
    """Average precision, the threshold, and precision, recall, F1 and images there, of each label, as Markdown."""
    given = answers.probabilities[-1] >= thresholds
    precision, recall, f1, support = precision_recall_fscore_support(
        answers.targets.numpy(), given.int().numpy(), zero_division=0
    )
    areas = answers.average_precisions.tolist()
    shown = sorted(range(len(labels)), key=lambda at: (support[at] == 0, f1[at]))[:MOST_ROWS]
    rows = [
        f"| {plain(labels[at])} | {areas[at]:.3f} | {thresholds[at]:.3f} | {precision[at]:.3f} | {recall[at]:.3f} "
        f"| {f1[at]:.3f} | {support[at]} |"
        for at in sorted(shown)
    ]
    head = "| label | average precision | threshold | precision | recall | F1 | images |"
    few = f", of {len(shown)} of {len(labels)} labels" if len(shown) < len(labels) else ""
    return ["## Labels", "", f"On {len(answers.targets)} {split} images{few}:", "", head, f"|{'---|' * 7}", *rows, ""]


def class_report(answers: Answers, labels: Sequence[str], split: str) -> list[str]:
    """Precision, recall, F1 and number of images of each class, and the pairs that are confused most, as Markdown."""
    precision, recall, f1, support = precision_recall_fscore_support(
        answers.targets.numpy(), answers.predictions.numpy(), labels=range(len(labels)), zero_division=0
    )
    shown = sorted(range(len(labels)), key=lambda index: (support[index] == 0, f1[index]))[:MOST_ROWS]
    title = f"On {len(answers.targets)} {split} images"
    if len(shown) < len(labels):
        title += f", of the {len(shown)} of {len(labels)} classes with the lowest F1"
    rows = [
        f"| {plain(labels[at])} | {precision[at]:.3f} | {recall[at]:.3f} | {f1[at]:.3f} | {support[at]} |"
        for at in sorted(shown)
    ]
    table = ["| class | precision | recall | F1 | images |", "|---|---|---|---|---|", *rows]
    return ["## Classes", "", f"{title}:", "", *table, "", *_confused_pairs(answers, labels)]


def confused_pairs(predictions: Tensor, targets: Tensor, classes: int, most: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the ``most`` pairs that are confused most often."""
    wrong = predictions != targets
    pairs, counts = torch.unique(targets[wrong] * classes + predictions[wrong], return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    return [
        (pair // classes, pair % classes, count)
        for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


def _confused_pairs(answers: Answers, labels: Sequence[str]) -> list[str]:
    pairs = confused_pairs(answers.predictions, answers.targets, len(labels), MOST_PAIRS)
    if not pairs:
        return []
    images = torch.bincount(answers.targets, minlength=len(labels))
    rows = [
        f"| {plain(labels[true])} | {plain(labels[predicted])} | {count} of {images[true]} |"
        for true, predicted, count in pairs
    ]
    return ["Confused most often:", "", "| true | predicted | images |", "|---|---|---|", *rows, ""]


def data_report(duplicates: Sequence[Pair], errors: Sequence[LabelError] | None) -> list[str]:
    """Near-duplicates across splits and probable label errors, as Markdown."""
    lines = ["## Images to look at", ""]
    lines += _listed(
        "These pairs of images of two splits look the same",
        [f"{pair.first} and {pair.second}" for pair in duplicates],
        "No image looks the same as one of another split.",
    )
    if errors is None:
        return [*lines, HINT, ""]
    return lines + _listed(
        "These may be labelled wrong",
        [f"{error.name}: labelled {error.given}, perhaps {error.suggested}" for error in errors],
        "No label looks wrong.",
    )


def _listed(title: str, items: Sequence[str], none: str) -> list[str]:
    if not items:
        return [none, ""]
    shown = f", the first {MOST_NAMES} of {len(items)}" if len(items) > MOST_NAMES else ""
    return [f"{title}{shown}:", "", *[f"- {plain(item)}" for item in items[:MOST_NAMES]], ""]


def plain(text: str) -> str:
    """Text of users, such as the name of a folder, that Markdown must not read anything into."""
    return "".join(f"\\{character}" if character in r"\`*_{}[]<>#|" else character for character in text)
