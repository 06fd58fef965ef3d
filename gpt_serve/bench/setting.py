"""What every benchmark is given: a backbone, how long and how much to measure, adapters and images.

Nothing is trained or downloaded: neither the values of adapters nor those of images change the time.
"""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import FILE_NAME, AdapterStore
from gpt_serve.bench.timing import Plan, Row, interleave, to_rows
from gpt_serve.engine.engine import Engine, ImageInput
from gpt_serve.engine.engine import Row as EngineRow
from gpt_serve.errors import GPTServeError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.methods.prompts import find_method

CLASSES = 20
PROMPTS = 20
PHOTO_SIZE = (500, 375)  # width, height: what image folders hold

Kinds = Sequence[tuple[str, int]]
UNLIKE: Kinds = [("gated", PROMPTS), ("vpt-deep", PROMPTS // 2), ("vpt-shallow", PROMPTS // 4), ("linear", 0)]


@dataclass(frozen=True)
class Scale:
    """How much of each comparison a backbone gets; the defaults are for a small one.

    Attributes:
        batch: images in a batch of `peers`, and the number of tasks in it.
        few_tasks: tasks in the second case of `peers`; 0 leaves this case out.
        unlike: whether `peers` also measures adapters with different numbers of prompts.
        long_batch: images in a batch of `peers` with 100 prompts.
        task_counts: tasks in a batch of 64 (`tasks`).
        swapped_counts: those of them at which swapping and PEFT are measured, too.
        prompt_counts: numbers of prompts (`prompts`).
        prompt_batches: batch sizes at which they are measured.
        engine_batches: batch sizes of `engines`.
        bank_counts: adapters on disk (`bank`).
        bank_batches: batches of 64 requests in a sample of `bank`.
        exponents: of the Zipf distribution of that traffic; 0 is uniform.
        cold: adapters of `cold`, of which the first is the warm-up.
        clients: at a time, of the HTTP server.
    """

    batch: int = 64
    few_tasks: int = 8
    unlike: bool = True
    long_batch: int = 16
    task_counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    swapped_counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    prompt_counts: Sequence[int] = (0, 10, 25, 50, 100, 200)
    prompt_batches: Sequence[int] = (1, 8, 32)
    engine_batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    bank_counts: Sequence[int] = (1, 10, 100, 1000, 10_000)
    bank_batches: int = 2
    exponents: Sequence[float] = (0.0, 1.1)
    cold: int = 31
    clients: Sequence[int] = (8, 32, 64)


FULL = Scale()
MIDDLE = Scale(
    few_tasks=0,
    unlike=False,
    task_counts=(1, 8, 64),
    swapped_counts=(8, 64),
    prompt_batches=(1, 8),
    bank_counts=(10_000,),
    bank_batches=1,
    exponents=(1.1,),
)
LARGE = dataclasses.replace(
    MIDDLE, batch=16, long_batch=8, task_counts=(1, 64), swapped_counts=(), prompt_counts=(0, 100), bank_counts=()
)


@dataclass(frozen=True)
class Setting:
    """A backbone, how long to measure it and how much."""

    backbone: Backbone
    plan: Plan
    scale: Scale

    @classmethod
    def of(cls, backbone: Backbone, plan: Plan) -> "Setting":
        """Choose the scale: on a CPU larger backbones get fewer points, or a run would take hours."""
        width = backbone.spec.width
        if backbone.device.type != "cpu" or width < 384:
            return cls(backbone, plan, FULL)
        return cls(backbone, plan, MIDDLE if width < 768 else LARGE)

    def time(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Measure the calls in turns, as `interleave` does, each until the device is done with it."""
        return interleave({name: self._finished(call) for name, call in calls.items()}, self.plan)

    def rows(
        self,
        benchmark: str,
        case: str,
        images: int,
        times: Mapping[str, Sequence[float]],
        extra: Mapping[str, Mapping[str, float]] | None = None,
    ) -> list[Row]:
        """Make rows of what `time` measured, see `to_rows`."""
        return to_rows(benchmark, self.backbone.name, case, images, times, extra)

    def _finished(self, call: Callable[[], object]) -> Callable[[], object]:
        device = self.backbone.device

        @torch.inference_mode()
        def run() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run


def untrained_adapter(
    backbone: Backbone, task: str, method: str = "gated", prompts: int = PROMPTS, *, closed: bool = False
) -> Adapter:
    """Make an adapter with random prompts and head, half-open gates (sigmoid(-1) = 0.27) and temperatures of 1.

    It crops nothing, so that images of the backbone's input size are its very input.

    Args:
        method: as ``gpt-serve train --method``; ``linear`` has no prompts whatever ``prompts`` says.
        closed: whether all gates are exactly 0 instead.
    """
    kind, spec = find_method(method), backbone.spec
    tensors: dict[str, Any] = {}
    if kind.prompts:
        tensors["prompt"] = 0.1 * torch.randn(spec.depth if kind.deep else 1, prompts, spec.width)
    if kind.gated:
        tensors["gamma"] = torch.full((spec.depth - 1,), float("-inf") if closed else -1.0)
    if kind.tempered:
        tensors["tau"] = torch.ones(spec.depth)
    return Adapter(
        task=task,
        method=method,
        backbone=backbone.name,
        backbone_sha256=backbone.fingerprint,
        labels=tuple(f"class-{index}" for index in range(CLASSES)),
        pool=spec.pool,
        preprocess=dataclasses.replace(spec.preprocess, crop_pct=1.0),
        training={},
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        head_weight=0.02 * torch.randn(CLASSES, spec.width),
        head_bias=torch.zeros(CLASSES),
        **tensors,
    )


@contextmanager
def temporary_store(backbone: Backbone) -> Iterator[AdapterStore]:
    """Give an empty store in a folder that goes away."""
    with TemporaryDirectory() as name:
        yield AdapterStore(Path(name) / "adapters", backbone.spec)


def write(store: AdapterStore, adapter: Adapter) -> None:
    """Do what `AdapterStore.publish` does without waiting for the disk: 10,000 adapters take seconds, not minutes."""
    folder = store.root / adapter.task
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_bytes(adapter.to_bytes())


def write_adapters(
    store: AdapterStore, backbone: Backbone, prefix: str, count: int, kinds: Kinds = (("gated", PROMPTS),)
) -> list[Adapter]:
    """Write ``count`` adapters ``<prefix>-<number>``, cycling through (method, prompts) pairs."""
    adapters = [
        untrained_adapter(backbone, f"{prefix}-{index}", *kind)
        for index, kind in enumerate(islice(cycle(kinds), count))
    ]
    for adapter in adapters:
        write(store, adapter)
    return adapters


def pixels(backbone: Backbone, count: int) -> list[Tensor]:
    """Make noise at the backbone's input size, uint8 (3, H, W) each."""
    generator = torch.Generator().manual_seed(0)
    size = (3, *backbone.spec.preprocess.input_size)
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for _ in range(count)]


def ready(backbone: Backbone, images: Sequence[Tensor]) -> Tensor:
    """Return the images as the backbone takes them: normalised, (B, 3, H, W), on its device."""
    preprocess = backbone.spec.preprocess
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return ((torch.stack(list(images)) / 255 - mean) / std).to(backbone.device)


def photo(seed: int, size: tuple[int, int] = PHOTO_SIZE) -> bytes:
    """Make a JPEG file with the spectrum of a photograph: octaves of noise, each weaker than the next coarser."""
    generator = np.random.default_rng(seed)
    width, height = size
    values = np.full((height, width, 3), 128.0)
    for octave in range(1, 10):
        cells = generator.integers(0, 256, (3 * 2**octave // 4 + 1, 2**octave, 3), dtype=np.uint8)
        scaled = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
        values += (np.asarray(scaled, dtype=np.float64) - 128) / 1.7 ** (octave - 1)
    file = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def answer(engine: Engine, requests: Sequence[tuple[str, ImageInput]]) -> None:
    """Predict and throw away; a request that fails ends the benchmark."""
    for result in engine.predict(requests):
        if isinstance(result, GPTServeError):
            raise result


def hold(engine: Engine, tasks: Sequence[str], images: Sequence[Tensor]) -> list[EngineRow]:
    """Make rows for `Engine.compute`, whose adapters stay in the bank for as long as the engine lives."""
    residents = {task: engine.bank.take(task) for task in dict.fromkeys(tasks)}
    return [EngineRow(residents[task], image) for task, image in zip(tasks, images, strict=True)]
