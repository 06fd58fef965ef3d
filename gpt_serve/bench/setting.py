"""What the parts of the run share: sizes, adapters, images, engines."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import FILE_NAME, AdapterStore
from gpt_serve.bench.inputs import untrained_adapter
from gpt_serve.bench.timing import Plan
from gpt_serve.engine.bank import DEFAULT_HOST_BYTES
from gpt_serve.engine.engine import Engine, Row
from gpt_serve.engine.slab import Packed
from gpt_serve.model.backbone import Backbone

PROMPTS = 20
MIXED_PROMPTS = (10, 12, 15, 20)
CLOSED = float("-inf")


@dataclass(frozen=True)
class Scale:
    """How much of each comparison a backbone gets.

    Attributes:
        batch: images in a batch of `peers`, and most tasks in it.
        few_tasks: tasks in its second case; 0 for no such case.
        unlike: whether it also measures prompts of unlike number.
        long_batch: images in a batch with 100 prompts.
        task_counts: points of the curve over tasks, in a batch of 64.
        swapped_counts: those at which grouped swapping and PEFT are measured, too.
        prompt_counts: points of the curve over prompts.
        prompt_batches: batches of that curve.
        bank_counts: points of the curve over adapters on disk.
        bank_batches: batches of 64 in a sample of that curve.
        exponents: Zipf's, of the traffic there; 0 is uniform.
        cold: adapters of `cold`, the first of which is the warm-up.
    """

    batch: int
    few_tasks: int
    unlike: bool
    long_batch: int
    task_counts: tuple[int, ...]
    swapped_counts: tuple[int, ...]
    prompt_counts: tuple[int, ...]
    prompt_batches: tuple[int, ...]
    bank_counts: tuple[int, ...]
    bank_batches: int
    exponents: tuple[float, ...]
    cold: int


FULL = Scale(
    batch=64,
    few_tasks=8,
    unlike=True,
    long_batch=16,
    task_counts=(1, 2, 4, 8, 16, 32, 64),
    swapped_counts=(1, 2, 4, 8, 16, 32, 64),
    prompt_counts=(0, 10, 25, 50, 100, 200),
    prompt_batches=(1, 8, 32),
    bank_counts=(1, 10, 100, 1000, 10_000),
    bank_batches=2,
    exponents=(0.0, 1.1),
    cold=31,
)
MIDDLE = dataclasses.replace(
    FULL,
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
        """On the CPU larger backbones get fewer points, so that the whole run ends within 20 minutes on two cores."""
        width = backbone.spec.width
        if backbone.device.type != "cpu" or width < 384:
            return cls(backbone, plan, FULL)
        return cls(backbone, plan, MIDDLE if width < 768 else LARGE)


def gated(backbone: Backbone, task: str, prompts: int, *, closed: bool = False, deep: bool = False) -> Adapter:
    """An adapter with random prompts and head, half-open gates (sigmoid(-1) = 0.27) or closed ones, temperature 1.

    It crops nothing, so that `pixels` are the very input of the forward pass.
    """
    method = "linear" if not prompts else "vpt-deep" if deep else "gated"
    adapter = untrained_adapter(backbone, task, method, prompts)
    gamma = torch.full_like(adapter.gamma, CLOSED) if closed and adapter.gamma is not None else adapter.gamma
    return dataclasses.replace(
        adapter, gamma=gamma, preprocess=dataclasses.replace(backbone.spec.preprocess, crop_pct=1.0)
    )


def write(store: AdapterStore, adapter: Adapter) -> None:
    """As `AdapterStore.publish`, without waiting for the disk: 10,000 adapters take seconds, not minutes."""
    folder = store.root / adapter.task
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_bytes(adapter.to_bytes())


def write_gated(store: AdapterStore, backbone: Backbone, prefix: str, counts: Sequence[int]) -> list[Adapter]:
    """A gated adapter for each number of prompts, on disk."""
    adapters = [gated(backbone, f"{prefix}-{index}", count) for index, count in enumerate(counts)]
    for adapter in adapters:
        write(store, adapter)
    return adapters


@contextmanager
def temporary_store(backbone: Backbone) -> Iterator[AdapterStore]:
    """An empty store in a folder that goes away."""
    with TemporaryDirectory() as name:
        yield AdapterStore(Path(name) / "adapters", backbone.spec)


def pixels(backbone: Backbone, count: int) -> list[Tensor]:
    """Noise at the backbone's input size, uint8 (3, H, W) each."""
    generator = torch.Generator().manual_seed(0)
    size = (3, *backbone.spec.preprocess.input_size)
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for _ in range(count)]


def ready(backbone: Backbone, images: Sequence[Tensor]) -> Tensor:
    """The images as the backbone takes them: normalised, (B, 3, H, W), on its device."""
    preprocess = backbone.spec.preprocess
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return ((torch.stack(list(images)) / 255 - mean) / std).to(backbone.device)


def finished(backbone: Backbone, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as serving runs it, waiting for a GPU to be done."""

    @torch.inference_mode()
    def run() -> object:
        result = call()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        return result

    return run


def adapter_bytes(adapter: Adapter) -> int:
    """Of its tensors, float32."""
    tensors = (adapter.prompt, adapter.gamma, adapter.tau, adapter.head_weight, adapter.head_bias)
    return sum(4 * math.prod(tensor.shape) for tensor in tensors if tensor is not None)


def weight_bytes(backbone: Backbone) -> int:
    """Of the backbone as it is."""
    return sum(weight.numel() * weight.element_size() for weight in backbone.model.parameters())


def engine_holding(
    store: AdapterStore, backbone: Backbone, count: int, like: Adapter, *, host: int | None = None
) -> Engine:
    """An engine whose bank holds ``count`` adapters of the same shape as ``like``.

    Args:
        host: adapters that the host tier holds, about; None for its usual size.
    """
    packed = Packed.of(like, backbone.spec)
    remembered = packed.layout.constant
    rows = count * packed.extent(remembered) + 1
    host_bytes = DEFAULT_HOST_BYTES if host is None else host * packed.nbytes
    return Engine(
        backbone, store, bank_bytes=rows * backbone.spec.width * backbone.dtype.itemsize, host_bytes=host_bytes
    )


def hold(engine: Engine, tasks: Sequence[str], images: Sequence[Tensor]) -> list[Row]:
    """Rows for `Engine.compute`, held in the bank for as long as the engine lives."""
    residents = {task: engine.bank.take(task) for task in dict.fromkeys(tasks)}
    return [Row(residents[task], image) for task, image in zip(tasks, images, strict=True)]
