"""What mixing costs: a batch of one task against batches of many, through the engine."""

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.inputs import photo, untrained_adapter
from gpt_serve.bench.timing import Plan, Row, interleave, to_rows
from gpt_serve.engine.engine import Engine, ImageInput
from gpt_serve.errors import GPTServeError
from gpt_serve.images.decode import decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.model.backbone import Backbone

BATCH = 32
PROMPTS = 20  # what `train` makes unless told otherwise
ALIKE = [("gated", PROMPTS)]
UNLIKE = [("gated", PROMPTS), ("vpt-deep", PROMPTS // 2), ("vpt-shallow", PROMPTS // 4), ("linear", 0)]


def bench_mixed(backbone: Backbone, plan: Plan, batch: int = BATCH) -> list[Row]:
    """One comparison per kind of input. All variants answer the same images and pad to the same number of prompts."""
    photos = [photo(seed) for seed in range(batch)]
    pixels = [preprocess_image(decode(file), backbone.spec.preprocess) for file in photos]
    inputs: dict[str, Sequence[ImageInput]] = {"pixels": pixels, "JPEG files": photos}
    rows = []
    with TemporaryDirectory() as folder:
        store = AdapterStore(folder, backbone.spec)
        alike, unlike = publish(backbone, store, "alike", ALIKE, batch), publish(backbone, store, "any", UNLIKE, batch)
        engine = Engine(backbone, store, max_batch=batch)
        for name, images in inputs.items():
            variants = {
                "one task": _batched(engine, alike[:1] * batch, images, batch),
                f"{batch} tasks": _batched(engine, alike, images, batch),
                f"{batch} tasks, methods and P mixed": _batched(engine, unlike, images, batch),
                f"{batch} tasks, a pass for each": _batched(engine, alike, images, 1),
            }
            times = interleave(variants, plan)
            rows += to_rows("mixed", backbone.name, f"batch {batch}, {name}", batch, times)
    return rows


def publish(
    backbone: Backbone, store: AdapterStore, prefix: str, kinds: Sequence[tuple[str, int]], count: int
) -> list[str]:
    """Store ``count`` adapters, cycling through (method, prompts) pairs; returns their tasks."""
    tasks = [f"{prefix}-{index}" for index in range(count)]
    for index, task in enumerate(tasks):
        store.publish(untrained_adapter(backbone, task, *kinds[index % len(kinds)]))
    return tasks


def answer(engine: Engine, requests: Sequence[tuple[str, ImageInput]]) -> None:
    """Predict and throw away; a request that fails ends the benchmark."""
    for result in engine.predict(requests):
        if isinstance(result, GPTServeError):
            raise result


def _batched(engine: Engine, tasks: Sequence[str], images: Sequence[ImageInput], size: int) -> Callable[[], None]:
    requests = list(zip(tasks, images, strict=True))
    parts = [requests[start : start + size] for start in range(0, len(requests), size)]

    def call() -> None:
        for part in parts:
            answer(engine, part)

    return call
