"""Accuracy of a stored adapter, measured through the engine that serves it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import GPTServeError, ImageError, UsageError
from gpt_serve.train.answers import average_precisions
from gpt_serve.train.data.datasets import Sample, Split, open_evaluation
from gpt_serve.train.data.samples import cannot_read, multi_hot

CHUNK = 256


def evaluate_task(
    engine: Engine, task: str, source: str, notice: Callable[[str], object] = lambda _: None
) -> dict[str, Any]:
    """Classify every test image of ``source``.

    Args:
        notice: told, a line at a time, what ``source`` holds that is not used.

    Returns:
        ``task``, ``revision``, ``accuracy`` in [0, 1] and ``n``; where images have several labels ``map``, the mean
        average precision, and ``accuracy`` as the share of labels that are rightly given or not.

    Raises:
        DataError: the folder cannot be evaluated on, or an image cannot be read (the first is named).
        AdapterError: the adapter cannot be used.
        UsageError: it was replaced meanwhile.
    """
    with engine.bank.holding(task) as resident:
        revision, known, thresholds = resident.revision, resident.labels, resident.thresholds
    dataset = open_evaluation(source, known)
    for line in dataset.unused:
        notice(line)
    samples = dataset.test
    if dataset.multi_label and thresholds is None:
        raise UsageError(f"--data {source} has several labels an image, {task!r} answers with one: use class folders")
    scores: list[Tensor] = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        results = engine.predict([(task, _read(sample)) for sample in chunk])
        for sample, result in zip(chunk, results, strict=True):
            if isinstance(result, ImageError):
                raise cannot_read(sample, result)
            if isinstance(result, GPTServeError):
                raise result
            assert isinstance(result, Prediction)
            if result.revision != revision:
                raise UsageError(f"adapter {task!r} was replaced while it was evaluated: repeat the command")
            scores.append(result.probabilities)
    return (
        {"task": task, "revision": revision} | _metrics(torch.stack(scores), samples, thresholds) | {"n": len(samples)}
    )


def _metrics(scores: Tensor, samples: Split, thresholds: Tensor | None) -> dict[str, float]:
    """What is told of probabilities (n, C) of ``samples``."""
    if thresholds is None:
        targets = torch.tensor([sample.target for sample in samples])
        return {"accuracy": (scores.argmax(1) == targets).double().mean().item()}
    truth = multi_hot(samples, scores.shape[1])
    right = ((scores >= thresholds) == (truth > 0)).double().mean().item()
    return {"map": average_precisions(scores, truth).nanmean().item(), "accuracy": right}


def _read(sample: Sample) -> bytes:
    try:
        return sample.read()
    except (ImageError, OSError) as error:
        raise cannot_read(sample, error) from error
