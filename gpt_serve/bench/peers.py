"""The engine against what users would pick instead: same machine, weights, images and, but for LoRA, adapters."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.authors import AuthorsModel
from gpt_serve.bench.engines import onnx_engine
from gpt_serve.bench.lora import lora_bytes, lora_model
from gpt_serve.bench.setting import (
    Setting,
    answer,
    hold,
    pixels,
    ready,
    temporary_store,
    untrained_adapter,
    write,
    write_adapters,
)
from gpt_serve.bench.swapped import TaskModel, grouped, in_arrival_order, separate_models, weight_bytes
from gpt_serve.bench.timing import Ratio, Row
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine, TorchForward
from gpt_serve.model.backbone import Backbone

ENGINE, REQUESTS, MIXED = "engine", "engine, from requests", "engine, 10 to 20 prompts"
ONNX, BF16, COMPILED = "engine, onnxruntime", "engine, bf16", "engine, bf16, compiled"
BARE, AUTHORS = "bare timm, no prompts", "authors-style loop, one task"
MODELS, PEFT = "a model per task", "PEFT, LoRA mixed"
ARRIVAL, GROUPED = "swapped per request", "swapped, grouped by task"
MIXED_PROMPTS = (10, 12, 15, 20)
MOST_COPIES = 6 * 2**30  # bytes of separate models
LONG = 100
CLOSE = 1e-5  # largest difference between two ways to compute the same probabilities

Calls = dict[str, Callable[[], object]]


def bench_peers(setting: Setting) -> list[Row]:
    """Compare on as many tasks as images, on fewer tasks than images, and on one task with many prompts."""
    scale = setting.scale
    cases = [_many_tasks(setting, scale.batch, tasks) for tasks in (scale.batch, scale.few_tasks) if tasks]
    return [row for rows in [*cases, _long(setting, scale.long_batch)] for row in rows]


def _many_tasks(setting: Setting, batch: int, tasks: int) -> list[Row]:
    """Compare everything with the engine on prepared rows; memory is counted for ``batch`` tasks."""
    backbone = setting.backbone
    with temporary_store(backbone) as store:
        adapters = write_adapters(store, backbone, "task", tasks)
        chosen = list(islice(cycle(adapters), batch))
        names, raw = [adapter.task for adapter in chosen], pixels(backbone, batch)
        images = ready(backbone, raw)
        engine = Engine(backbone, store)
        check_answers(engine, chosen, raw, images)
        calls = _engines(setting, engine, store, names, raw)
        calls[BARE] = partial(backbone.timm_model, images)
        calls[AUTHORS] = partial(AuthorsModel(backbone, adapters[0]), images)
        module = TaskModel(backbone, adapters[0])
        calls[GROUPED] = partial(grouped, [module], chosen, images)
        if tasks < batch:  # else every request has its own task and this is the same work
            calls[ARRIVAL] = partial(in_arrival_order, module, chosen, images)
        else:
            calls[MODELS] = partial(grouped, separate_models(backbone, adapters, MOST_COPIES), chosen, images)
        if (peft := lora_model(backbone, adapters)) is not None:
            calls[PEFT] = partial(peft, images, names)
        times = setting.time(calls)
        extra = _speeds(times, _megabytes(backbone, adapters[0], batch))
        return setting.rows("peers", f"batch {batch}, {tasks} tasks", batch, times, extra)


def _engines(setting: Setting, engine: Engine, store: AdapterStore, names: list[str], raw: list[Tensor]) -> Calls:
    """Return the engine's calls: on prepared rows, from requests, with unlike prompts, on other means to compute."""
    backbone = setting.backbone
    calls: Calls = {
        ENGINE: partial(engine.compute, hold(engine, names, raw)),
        REQUESTS: partial(answer, engine, list(zip(names, raw, strict=True))),
    }
    if setting.scale.unlike:
        kinds = [("gated", count) for count in MIXED_PROMPTS]
        unlike = write_adapters(store, backbone, "any", len(set(names)), kinds)
        chosen = [adapter.task for adapter in islice(cycle(unlike), len(raw))]
        calls[MIXED] = partial(engine.compute, hold(engine, chosen, raw))
    half = Backbone(copy.deepcopy(backbone.model), backbone.spec, str(backbone.device))
    half.cast(torch.bfloat16)
    others = {BF16: Engine(half, store)}
    if backbone.device.type == "cuda":
        others[COMPILED] = Engine(half, store, forward=TorchForward(half, compiled=True))
    else:
        others[ONNX] = onnx_engine(backbone, store, len(raw))
    return calls | {name: partial(other.compute, hold(other, names, raw)) for name, other in others.items()}


def _long(setting: Setting, batch: int) -> list[Row]:
    """Compare the engine with open and with closed gates, and the authors' loop, on one task with many prompts."""
    backbone = setting.backbone
    with temporary_store(backbone) as store:
        opened = untrained_adapter(backbone, "open", prompts=LONG)
        closed = untrained_adapter(backbone, "closed", prompts=LONG, closed=True)
        raw = pixels(backbone, batch)
        images, engine = ready(backbone, raw), Engine(backbone, store)
        calls: Calls = {}
        for adapter in (opened, closed):
            write(store, adapter)
            check_answers(engine, [adapter] * batch, raw, images)
            calls[f"engine, {adapter.task} gates"] = partial(engine.compute, hold(engine, [adapter.task] * batch, raw))
        calls[BARE] = partial(backbone.timm_model, images)
        calls[AUTHORS] = partial(AuthorsModel(backbone, opened), images)
        times = setting.time(calls)
        return setting.rows("peers", f"batch {batch}, one task, {LONG} prompts", batch, times, _speeds(times, {}))


def check_answers(engine: Engine, adapters: Sequence[Adapter], raw: Sequence[Tensor], images: Tensor) -> None:
    """Check that engine, swapped module and authors' loop answer alike: a wrong yardstick measures nothing.

    Raises:
        AssertionError: they don't.
    """
    backbone = engine.backbone
    found = engine.predict([(adapter.task, image) for adapter, image in zip(adapters, raw, strict=True)])
    answers = torch.stack([result.probabilities for result in found if isinstance(result, Prediction)])
    first = [index for index, adapter in enumerate(adapters) if adapter.task == adapters[0].task]
    module, loop = TaskModel(backbone, adapters[0]), AuthorsModel(backbone, adapters[0])
    with torch.inference_mode():
        swapped, authors = grouped([module], adapters, images), loop(images[first])
    for name, expected, actual in ((GROUPED, answers, swapped), (AUTHORS, answers[first], authors)):
        difference = (expected - actual.float().cpu()).abs().max().item()
        assert difference <= CLOSE, f"{name}: probabilities differ from the engine's by {difference:.1e}"


def _speeds(
    times: Mapping[str, Sequence[float]], extra: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Add to ``extra`` each variant's time by the bare backbone's and its throughput by the authors' loop's."""
    columns = {}
    for name, seconds in times.items():
        by_bare, by_authors = Ratio.of(seconds, times[BARE]), Ratio.of(times[AUTHORS], seconds)
        columns[name] = {"by bare": by_bare.median, "speed by authors": by_authors.median, **extra.get(name, {})}
    return columns


def _megabytes(backbone: Backbone, adapter: Adapter, tasks: int) -> dict[str, dict[str, float]]:
    """Count, not measure, the weights and adapters of ``tasks`` tasks."""
    tensors = (adapter.prompt, adapter.gamma, adapter.tau, adapter.head_weight, adapter.head_bias)
    own = sum(4 * math.prod(tensor.shape) for tensor in tensors if tensor is not None)
    weights, adapters = weight_bytes(backbone), tasks * own
    counted = {BARE: weights, MODELS: tasks * weights + adapters, PEFT: weights + tasks * lora_bytes(backbone)}
    counted |= dict.fromkeys((ENGINE, GROUPED, ARRIVAL), weights + adapters) | {BF16: (weights + adapters) // 2}
    return {name: {f"MB for {tasks} tasks": total / 1e6} for name, total in counted.items()}
