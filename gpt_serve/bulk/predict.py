"""From images to rows, part by part, with the next images being read while some are computed."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

from gpt_serve.bulk.inputs import Entry, Images
from gpt_serve.bulk.parts import SCHEMA, Parts
from gpt_serve.engine.engine import Answer, Engine
from gpt_serve.engine.segment import Segmentation
from gpt_serve.errors import GPTServeError, ImageError, UsageError

T = TypeVar("T")


def predict_in_bulk(
    engine: Engine, tasks: Sequence[str], images: Images, parts: Parts, on_images: Callable[[int], object]
) -> dict[str, int]:
    """Predict what is not yet predicted, on this machine.

    Args:
        engine: has the tasks.
        on_images: told how many images are done, also of those that an interrupted run has left.

    Returns:
        As `Parts.finish`.

    Raises:
        AdapterError: an adapter was removed or cannot be used any more; what is done is kept.
        UsageError: as `Parts.held`.
    """
    return parts.complete(
        lambda pending: ((part, predict_part(engine, tasks, images, parts.range(part), on_images)) for part in pending),
        on_images,
    )


def predict_part(
    engine: Engine,
    tasks: Sequence[str],
    images: Images,
    span: tuple[int, int],
    on_images: Callable[[int], object] = lambda count: None,
) -> pa.Table:
    """The rows of images ``span``, from and to; see `SCHEMA`."""
    rows: list[dict[str, Any]] = []
    for entries in _ahead(images.read(*span, engine.max_batch)):
        rows += _rows(engine, tasks, entries)
        on_images(len(entries))
    return pa.Table.from_pylist(rows, SCHEMA)


def _rows(engine: Engine, tasks: Sequence[str], entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """All tasks of an image side by side, so that they meet in a batch."""
    asked = [(task, entry.data) for entry in entries if isinstance(entry.data, bytes) for task in tasks]
    answers = iter(engine.predict(asked))
    for entry in entries:
        for task in tasks:
            result = next(answers) if isinstance(entry.data, bytes) else entry.data
            yield {"image": entry.name, "task": task} | _outcome(result)


def _outcome(result: Answer | ImageError) -> dict[str, Any]:
    if isinstance(result, ImageError):
        return {"error": str(result)}
    if isinstance(result, GPTServeError):  # of the adapter: no image is to blame
        raise result
    if isinstance(result, Segmentation):
        raise UsageError(f"task {result.task!r} answers with masks, which a table does not hold: leave it out")
    ((label, probability),) = result.top(1)
    return {"label": label, "probability": probability, "known": result.known, "revision": result.revision}


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; one is being made while the last one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
