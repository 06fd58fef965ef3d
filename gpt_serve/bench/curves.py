"""What prompts cost, and what many tasks in a batch cost."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.bench.authors import AuthorsModel
from gpt_serve.bench.lora import lora_model
from gpt_serve.bench.setting import (
    UNLIKE,
    Setting,
    answer,
    hold,
    photo,
    pixels,
    ready,
    temporary_store,
    untrained_adapter,
    write,
    write_adapters,
)
from gpt_serve.bench.swapped import TaskModel, grouped
from gpt_serve.bench.timing import Row
from gpt_serve.engine.engine import Engine, ImageInput
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import Layout

BATCH, MIXED_BATCH = 64, 32
ENGINE, GROUPED, PEFT = "engine", "swapped, grouped by task", "PEFT, LoRA mixed"
BARE, PARTS = "bare timm", "bare timm, in the engine's passes"
KINDS = {"open": ("gated", False), "closed": ("gated", True), "deep": ("vpt-deep", False)}

Calls = dict[str, Callable[[], object]]


def bench_prompts(setting: Setting) -> list[Row]:
    """Compare 0 to 200 prompts of one task, open, behind closed gates and deep, with timm's own forward pass."""
    backbone, scale = setting.backbone, setting.scale
    adapters = _adapters(setting)
    extra = _flop_ratios(backbone, adapters)
    rows = []
    with temporary_store(backbone) as store:
        for adapter in adapters.values():
            write(store, adapter)
        engine = Engine(backbone, store)
        for batch in scale.prompt_batches:
            raw = pixels(backbone, batch)
            images = ready(backbone, raw)
            calls: Calls = {BARE: partial(backbone.timm_model, images)}
            parts = engine.planner.plan([Layout.of(adapters["open, 0"], backbone.spec.depth)] * batch)
            if len(parts) > 1:  # smaller passes alone may be faster on a CPU: that is not what prompts cost
                calls[PARTS] = partial(_in_parts, backbone, [images[part] for part in parts])
            for name, adapter in adapters.items():
                calls[name] = partial(engine.compute, hold(engine, [adapter.task] * batch, raw))
            rows += setting.rows("prompts", f"batch {batch}", batch, setting.time(calls), extra)
    return rows


def bench_tasks(setting: Setting) -> list[Row]:
    """Compare 1 to 64 tasks in a batch of 64: the engine (the base, with one), swapping grouped by task, PEFT."""
    backbone, scale = setting.backbone, setting.scale
    # In this order: what is compared most closely lies close together in time.
    engines: Calls = {}
    swapping: Calls = {}
    lora: Calls = {}
    with temporary_store(backbone) as store:
        adapters = write_adapters(store, backbone, "task", max(scale.task_counts))
        raw = pixels(backbone, BATCH)
        images = ready(backbone, raw)
        engine, module = Engine(backbone, store), TaskModel(backbone, adapters[0])
        peft = lora_model(backbone, adapters) if scale.swapped_counts else None
        for count in scale.task_counts:
            chosen = list(islice(cycle(adapters[:count]), BATCH))
            tasks = [adapter.task for adapter in chosen]
            engines[f"{ENGINE}, {count}"] = partial(engine.compute, hold(engine, tasks, raw))
            if count in scale.swapped_counts:
                swapping[f"{GROUPED}, {count}"] = partial(grouped, [module], chosen, images)
                if peft is not None:
                    lora[f"{PEFT}, {count}"] = partial(peft, images, tasks)
        return setting.rows("tasks", f"batch {BATCH}", BATCH, setting.time(engines | swapping | lora))


def bench_mixed(setting: Setting, batch: int = MIXED_BATCH) -> list[Row]:
    """Compare a batch of one task with batches of many, from requests: scaled images, then JPEG files."""
    backbone, rows = setting.backbone, []
    inputs: dict[str, Sequence[ImageInput]] = {
        "pixels": pixels(backbone, batch),
        "JPEG files": [photo(seed) for seed in range(batch)],
    }
    with temporary_store(backbone) as store:
        alike = [adapter.task for adapter in write_adapters(store, backbone, "alike", batch)]
        unlike = [adapter.task for adapter in write_adapters(store, backbone, "any", batch, UNLIKE)]
        engine = Engine(backbone, store, max_batch=batch)
        for name, images in inputs.items():
            calls: Calls = {
                "one task": partial(_in_batches, engine, alike[:1] * batch, images, batch),
                f"{batch} tasks": partial(_in_batches, engine, alike, images, batch),
                f"{batch} tasks, methods and P mixed": partial(_in_batches, engine, unlike, images, batch),
                f"{batch} tasks, a pass for each": partial(_in_batches, engine, alike, images, 1),
            }
            rows += setting.rows("mixed", f"batch {batch}, {name}", batch, setting.time(calls))
    return rows


def flops(run: Callable[[Tensor], object], images: Tensor) -> int:
    """Count the floating-point operations of ``run(images)`` in matrix products, attention and convolutions."""
    # As plain matrix products: not every version counts the fused kernels of every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
        run(images)
    total: int = counter.get_total_flops()
    return total


def _adapters(setting: Setting) -> dict[str, Adapter]:
    """Make an adapter of each kind and number of prompts; without prompts all kinds are the same."""
    return {
        f"{kind}, {count}": untrained_adapter(
            setting.backbone, f"{kind}-{count}", method if count else "linear", count, closed=closed
        )
        for kind, (method, closed) in KINDS.items()
        for count in setting.scale.prompt_counts
        if count or kind == "open"
    }


def _flop_ratios(backbone: Backbone, adapters: dict[str, Adapter]) -> dict[str, dict[str, float]]:
    """Divide the textbook's count, by which every block computes every row whatever its gate, by the backbone's."""
    one = ready(backbone, pixels(backbone, 1))
    bare = flops(backbone.timm_model, one)
    ratios = {BARE: 1.0, PARTS: 1.0} | dict.fromkeys(adapters, 1.0)
    for name, adapter in adapters.items():
        if adapter.prompts:
            textbook = AuthorsModel(backbone, untrained_adapter(backbone, "textbook", "gated", adapter.prompts))
            ratios[name] = flops(textbook, one) / bare
    return {name: {"FLOP ratio": ratio} for name, ratio in ratios.items()}


def _in_parts(backbone: Backbone, parts: list[Tensor]) -> None:
    for part in parts:
        backbone.timm_model(part)


def _in_batches(engine: Engine, tasks: Sequence[str], images: Sequence[ImageInput], size: int) -> None:
    requests = list(zip(tasks, images, strict=True))
    for start in range(0, len(requests), size):
        answer(engine, requests[start : start + size])
