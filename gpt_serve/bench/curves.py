"""Two curves over what a batch holds: its tasks, and its prompts."""

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice

from authors import AuthorsModel
from peers import lora_model
from setting import PROMPTS, Setting, finished, gated, hold, pixels, ready, temporary_store, write, write_gated
from swapped import TaskModel, grouped

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.bench.forward import flops
from gpt_serve.bench.timing import Row, interleave, to_rows
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import Layout

BATCH = 64
ENGINE, GROUPED, PEFT = "engine", "swapped, grouped by task", "PEFT, LoRA mixed"
BARE, PARTS = "bare timm", "bare timm, in the engine's passes"
KINDS = {"open": {}, "closed": {"closed": True}, "deep": {"deep": True}}


def bench_tasks(setting: Setting) -> list[Row]:
    """1 to 64 tasks in a batch of 64: the engine (the base, with one), swapping grouped by task, PEFT."""
    backbone, scale = setting.backbone, setting.scale
    engines, swapping, lora = {}, {}, {}  # in this order: what is compared most closely lies close together in time
    with temporary_store(backbone) as store:
        adapters = write_gated(store, backbone, "task", [PROMPTS] * max(scale.task_counts))
        raw = pixels(backbone, BATCH)
        images = ready(backbone, raw)
        engine, module = Engine(backbone, store), TaskModel(backbone, adapters[0])
        peft = lora_model(backbone, adapters) if scale.swapped_counts else None
        for count in scale.task_counts:
            chosen = list(islice(cycle(adapters[:count]), BATCH))
            tasks = [adapter.task for adapter in chosen]
            engines[f"{ENGINE}, {count}"] = partial(engine.compute, hold(engine, tasks, raw))
            if count in scale.swapped_counts:
                swapping[f"{GROUPED}, {count}"] = partial(grouped, module, chosen, images)
                if peft is not None:
                    lora[f"{PEFT}, {count}"] = partial(peft, images, tasks)
        calls: dict[str, Callable[[], object]] = engines | swapping | lora
        times = interleave({name: finished(backbone, call) for name, call in calls.items()}, setting.plan)
    return to_rows("tasks", backbone.name, f"batch {BATCH}", BATCH, times)


def bench_prompts(setting: Setting) -> list[Row]:
    """0 to 200 prompts of one task: open gates, closed ones, and deep prompts; the base is timm's own forward pass."""
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
            calls: dict[str, Callable[[], object]] = {BARE: partial(backbone.model, images)}
            parts = engine.planner.plan([Layout.of(adapters["open, 0"], backbone.spec.depth)] * batch)
            if len(parts) > 1:  # smaller passes alone may be faster on a CPU: that is not what prompts cost
                calls[PARTS] = partial(_in_parts, backbone, [images[part] for part in parts])
            for name, adapter in adapters.items():
                calls[name] = partial(engine.compute, hold(engine, [adapter.task] * batch, raw))
            times = interleave({name: finished(backbone, call) for name, call in calls.items()}, setting.plan)
            rows += to_rows("prompts", backbone.name, f"batch {batch}", batch, times, extra)
    return rows


def _adapters(setting: Setting) -> dict[str, Adapter]:
    adapters = {}
    for kind, options in KINDS.items():
        for count in setting.scale.prompt_counts:
            if count or kind == "open":  # without prompts all kinds are the same
                adapters[f"{kind}, {count}"] = gated(setting.backbone, f"{kind}-{count}", count, **options)
    return adapters


def _flop_ratios(backbone: Backbone, adapters: dict[str, Adapter]) -> dict[str, dict[str, float]]:
    """The textbook's count, in which every block computes every row whatever the gates are, by that of the backbone."""
    one = ready(backbone, pixels(backbone, 1))
    bare = flops(backbone.model, one)
    ratios = {BARE: {"FLOP ratio": 1.0}, PARTS: {"FLOP ratio": 1.0}}
    for name, adapter in adapters.items():
        count = adapter.prompts
        textbook = flops(AuthorsModel(backbone, gated(backbone, "textbook", count)), one) if count else bare
        ratios[name] = {"FLOP ratio": textbook / bare}
    return ratios


def _in_parts(backbone: Backbone, parts: list[object]) -> list[object]:
    return [backbone.model(part) for part in parts]
