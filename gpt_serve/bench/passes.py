"""How batches should become passes: how many rows a pass should have, and when to part rows of different kinds."""

import dataclasses
from collections.abc import Callable

from setting import Setting, gated, hold, pixels, temporary_store, write

from gpt_serve.bench.timing import Row, interleave, to_rows
from gpt_serve.engine.build import faster_forward
from gpt_serve.engine.engine import Engine, Forward, TorchForward
from gpt_serve.engine.passes import HIDDEN, Costs

BATCH, FEW = 64, 16
MOST_ROWS = (None, 8192, 4096, 2048, 1024)
PROMPTS = (0, 20, 100)
KINDS = {
    "half of the rows behind closed gates, P = 100": [("open-100", 1), ("closed-100", 1)],
    "one of eight behind closed gates, P = 100": [("open-100", 7), ("closed-100", 1)],
    "half with P = 100, half with P = 0": [("open-100", 1), ("open-0", 1)],
    "half with P = 20, half with P = 0": [("open-20", 1), ("open-0", 1)],
}
OVERHEADS = {"one pass": float("inf"), "as planned": None, "a pass for each kind": 0.0}


def bench_passes(setting: Setting) -> list[Row]:
    """Pass sizes for open prompts of each length, and plans for mixed batches of 16; with torch, with the default."""
    backbone = setting.backbone
    forwards: dict[str, Forward] = {"torch": TorchForward(backbone)}
    if backbone.device.type == "cpu":
        forwards["default"] = faster_forward(backbone)
    rows: list[Row] = []
    with temporary_store(backbone) as store:
        for prompts in PROMPTS:
            write(store, gated(backbone, f"open-{prompts}", prompts))
        write(store, gated(backbone, "closed-100", 100, closed=True))
        for name, forward in forwards.items():
            engine = Engine(backbone, store, max_batch=BATCH, forward=forward)
            rows += _sizes(setting, engine, name) + _mixes(setting, engine, name)
    return rows


def _sizes(setting: Setting, engine: Engine, name: str) -> list[Row]:
    images, width = pixels(setting.backbone, BATCH), setting.backbone.spec.width
    rows: list[Row] = []
    for prompts in PROMPTS:
        held = hold(engine, [f"open-{prompts}"] * BATCH, images)
        variants = {
            f"{most or 'any number of'} rows a pass": _planned(
                engine, held, most_bytes=most and most * HIDDEN * 4 * width
            )
            for most in MOST_ROWS
        }
        times = interleave(variants, setting.plan)
        rows += to_rows("passes", setting.backbone.name, f"{name}, batch {BATCH}, P = {prompts}", BATCH, times)
    return rows


def _mixes(setting: Setting, engine: Engine, name: str) -> list[Row]:
    images, own = pixels(setting.backbone, FEW), engine.planner.costs.overhead
    rows: list[Row] = []
    for kind, mix in KINDS.items():
        tasks = [task for task, share in mix for _ in range(share)] * (FEW // sum(share for _, share in mix))
        held = hold(engine, tasks, images)
        variants = {
            plan: _planned(engine, held, overhead=own if overhead is None else overhead)
            for plan, overhead in OVERHEADS.items()
        }
        times = interleave(variants, setting.plan)
        rows += to_rows("passes", setting.backbone.name, f"{name}, batch {FEW}, {kind}", FEW, times)
    return rows


def _planned(engine: Engine, held: list, **changes: float | int | None) -> Callable[[], object]:
    """`Engine.compute` with other costs."""
    costs: Costs = dataclasses.replace(engine.planner.costs, **changes)
    planner = dataclasses.replace(engine.planner, costs=costs)

    def call() -> None:
        engine.planner = planner
        engine.compute(held)

    return call
