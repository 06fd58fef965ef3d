"""Accuracy of a stored adapter, measured through the engine that serves it."""

from collections.abc import Callable
from typing import Any

from gpt_serve.engine.engine import Engine, Prediction
from gpt_serve.errors import GPTServeError, ImageError, UsageError
from gpt_serve.train.data.datasets import Sample, open_evaluation
from gpt_serve.train.data.samples import cannot_read

CHUNK = 256


def evaluate_task(
    engine: Engine, task: str, source: str, notice: Callable[[str], object] = lambda _: None
) -> dict[str, Any]:
    """Classify every test image of ``source``.

    Args:
        notice: told, a line at a time, what ``source`` holds that is not used.

    Returns:
        ``task``, ``revision``, ``accuracy`` in [0, 1] and ``n``.

    Raises:
        DataError: the folder cannot be evaluated on, or an image cannot be read (the first is named).
        AdapterError: the adapter cannot be used.
        UsageError: it was replaced meanwhile.
    """
    with engine.bank.holding(task) as resident:
        revision, known = resident.revision, resident.labels
    dataset = open_evaluation(source, known)
    for line in dataset.unused:
        notice(line)
    samples = dataset.test
    correct = 0
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
            correct += result.top(1)[0][0] == known[sample.target]
    return {"task": task, "revision": revision, "accuracy": correct / len(samples), "n": len(samples)}


def _read(sample: Sample) -> bytes:
    try:
        return sample.read()
    except (ImageError, OSError) as error:
        raise cannot_read(sample, error) from error
