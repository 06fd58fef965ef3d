"""The engine against what users would pick instead: same machine, weights, images and, but for LoRA, adapters."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from authors import AuthorsModel
from lora import LoraModel, lora_bytes
from setting import (
    MIXED_PROMPTS,
    PROMPTS,
    Setting,
    adapter_bytes,
    finished,
    gated,
    hold,
    pixels,
    ready,
    temporary_store,
    weight_bytes,
    write,
    write_gated,
)
from swapped import TaskModel, each_its_own, grouped, in_arrival_order, separate_models
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.engines import onnx_engine
from gpt_serve.bench.mixed import answer
from gpt_serve.bench.timing import Ratio, Row, interleave, to_rows
from gpt_serve.engine.engine import Engine, TorchForward
from gpt_serve.model.backbone import Backbone

ENGINE, REQUESTS, MIXED = "engine", "engine, from requests", "engine, 10 to 20 prompts"
ONNX, BF16, COMPILED = "engine, onnxruntime", "engine, bf16", "engine, bf16, compiled"
BARE, AUTHORS = "bare timm, no prompts", "authors-style loop, one task"
MODELS, ARRIVAL, GROUPED, PEFT = (
    "a model per task",
    "swapped per request",
    "swapped, grouped by task",
    "PEFT, LoRA mixed",
)
MOST_COPIES = 6 * 2**30  # bytes of separate models
LONG = 100
CLOSE = 1e-5  # largest difference between two ways to compute the same probabilities


def bench_peers(setting: Setting) -> list[Row]:
    """As many tasks as images, fewer tasks than images, and the authors' loop with many prompts."""
    scale = setting.scale
    return [
        row for tasks in (scale.batch, scale.few_tasks) if tasks for row in _many_tasks(setting, scale.batch, tasks)
    ] + _long(setting, scale.long_batch)


def _many_tasks(setting: Setting, batch: int, tasks: int) -> list[Row]:
    """One comparison; the base is the engine on prepared rows. Memory is counted for ``batch`` tasks."""
    backbone = setting.backbone
    with temporary_store(backbone) as store:
        adapters = write_gated(store, backbone, "task", [PROMPTS] * tasks)
        chosen = list(islice(cycle(adapters), batch))
        names, raw = [adapter.task for adapter in chosen], pixels(backbone, batch)
        images = ready(backbone, raw)
        engine = Engine(backbone, store)
        check_answers(engine, chosen, raw, images)
        calls = _engines(setting, engine, store, names, raw)
        calls[BARE] = partial(backbone.model, images)
        calls[AUTHORS] = partial(AuthorsModel(backbone, adapters[0]), images)
        module = TaskModel(backbone, adapters[0])
        calls[GROUPED] = partial(grouped, module, chosen, images)
        if tasks < batch:  # else every request has its own task and this is the same work
            calls[ARRIVAL] = partial(in_arrival_order, module, chosen, images)
        else:
            models = separate_models(backbone, adapters, MOST_COPIES, weight_bytes(backbone))
            calls[MODELS] = partial(each_its_own, models, chosen, images)
        peft = lora_model(backbone, adapters)
        if peft is not None:
            calls[PEFT] = partial(peft, images, names)
        times = interleave({name: finished(backbone, call) for name, call in calls.items()}, setting.plan)
        extra = _speeds(times, _megabytes(backbone, adapters[0], batch))
        return to_rows("peers", backbone.name, f"batch {batch}, {tasks} tasks", batch, times, extra)


def _engines(
    setting: Setting, engine: Engine, store: AdapterStore, names: Sequence[str], raw: Sequence[Tensor]
) -> dict[str, Callable[[], object]]:
    """On rows that are held and prepared; from requests; with prompts of unlike number; on other means to compute."""
    backbone, tasks = setting.backbone, len(set(names))
    calls: dict[str, Callable[[], object]] = {
        ENGINE: partial(engine.compute, hold(engine, names, raw)),
        REQUESTS: partial(answer, engine, list(zip(names, raw, strict=True))),
    }
    if setting.scale.unlike:
        unlike = write_gated(store, backbone, "any", list(islice(cycle(MIXED_PROMPTS), tasks)))
        chosen = [adapter.task for adapter in islice(cycle(unlike), len(raw))]
        calls[MIXED] = partial(engine.compute, hold(engine, chosen, raw))
    half = Backbone(copy.deepcopy(backbone.model), backbone.spec, str(backbone.device))
    half.cast(torch.bfloat16)
    others = {BF16: Engine(half, store)}
    if backbone.device.type == "cuda":
        others[COMPILED] = Engine(half, store, forward=TorchForward(half, compiled=True))
    else:
        others[ONNX] = onnx_engine(backbone, store, store.root.parent, len(raw))
    for name, other in others.items():
        calls[name] = partial(other.compute, hold(other, names, raw))
    return calls


def _long(setting: Setting, batch: int) -> list[Row]:
    """One task with many prompts: the engine with open and with closed gates, and the authors' loop."""
    backbone = setting.backbone
    with temporary_store(backbone) as store:
        opened, closed = gated(backbone, "open", LONG), gated(backbone, "closed", LONG, closed=True)
        write(store, opened)
        write(store, closed)
        raw = pixels(backbone, batch)
        images = ready(backbone, raw)
        engine = Engine(backbone, store)
        check_answers(engine, [opened] * batch, raw, images)
        check_answers(engine, [closed] * batch, raw, images)
        calls: dict[str, Callable[[], object]] = {
            "engine, open gates": partial(engine.compute, hold(engine, ["open"] * batch, raw)),
            "engine, closed gates": partial(engine.compute, hold(engine, ["closed"] * batch, raw)),
            BARE: partial(backbone.model, images),
            AUTHORS: partial(AuthorsModel(backbone, opened), images),
        }
        times = interleave({name: finished(backbone, call) for name, call in calls.items()}, setting.plan)
        case = f"batch {batch}, one task, {LONG} prompts"
        return to_rows("peers", backbone.name, case, batch, times, _speeds(times, {}))


def check_answers(engine: Engine, adapters: Sequence[Adapter], raw: Sequence[Tensor], images: Tensor) -> None:
    """Engine, swapped module and authors' loop must answer alike: a wrong yardstick measures nothing.

    Raises:
        AssertionError: they don't.
    """
    backbone = engine.backbone
    requests = [(adapter.task, image) for adapter, image in zip(adapters, raw, strict=True)]
    answers = torch.stack([result.probabilities for result in engine.predict(requests)])  # type: ignore[union-attr]
    first = [index for index, adapter in enumerate(adapters) if adapter.task == adapters[0].task]
    module, loop = TaskModel(backbone, adapters[0]), AuthorsModel(backbone, adapters[0])
    with torch.inference_mode():
        swapped, authors = grouped(module, adapters, images), loop(images[first])
    for name, expected, actual in ((GROUPED, answers, swapped), (AUTHORS, answers[first], authors)):
        difference = (expected - actual.float().cpu()).abs().max().item()
        assert difference <= CLOSE, f"{name}: probabilities differ from the engine's by {difference:.1e}"


def lora_model(backbone: Backbone, adapters: Sequence[Adapter]) -> LoraModel | None:
    """None, and a line that says so, where peft is not installed."""
    try:
        return LoraModel(backbone, adapters)
    except ImportError:
        print("peft is not installed: its rows are left out (pip install peft)")
        return None


def _speeds(
    times: Mapping[str, Sequence[float]], extra: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Further columns: each variant's time by the bare backbone's, its throughput by the authors' loop's."""
    columns = {}
    for name, seconds in times.items():
        by_bare, by_authors = Ratio.of(seconds, times[BARE]), Ratio.of(times[AUTHORS], seconds)
        columns[name] = {"by bare": by_bare.median, "speed by authors": by_authors.median, **extra.get(name, {})}
    return columns


def _megabytes(backbone: Backbone, adapter: Adapter, tasks: int) -> dict[str, dict[str, float]]:
    """Weights and adapters of ``tasks`` tasks, counted, not measured."""
    weights, adapters = weight_bytes(backbone), tasks * adapter_bytes(adapter)
    counted = {BARE: weights, MODELS: tasks * weights + adapters, PEFT: weights + tasks * lora_bytes(backbone)}
    counted |= dict.fromkeys((ENGINE, GROUPED, ARRIVAL), weights + adapters)
    counted[BF16] = (weights + adapters) // 2
    return {name: {f"MB for {tasks} tasks": total / 1e6} for name, total in counted.items()}
