"""The engine's own work around the forward pass: stacking, normalising, gathering, heads, results.

What counts as the forward pass is `embed` and `tapped_features` on tensors that are ready.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor

from gpt_serve.bench.setting import Setting, hold, pixels, ready, temporary_store, write_adapters
from gpt_serve.bench.timing import Row
from gpt_serve.engine import engine as engine_module
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.slab import gather
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import embed, tapped_features

BATCH = 32
FORWARD, COMPUTE = "forward pass on ready tensors", "engine"


def bench_overhead(setting: Setting) -> list[Row]:
    """Compare on a batch of one task, and on one of as many tasks as images.

    ``own share`` is measured within the same calls, on a CPU: the time outside of the forward pass by the whole. As the
    difference of two calls it would drown in their noise. On a GPU, where calls return early, the ratio has to do.
    """
    backbone, rows = setting.backbone, []
    with temporary_store(backbone) as store:
        tasks = [adapter.task for adapter in write_adapters(store, backbone, "task", BATCH)]
        raw = pixels(backbone, BATCH)
        images = ready(backbone, raw)
        engine = Engine(backbone, store)
        for case, chosen in (("one task", tasks[:1] * BATCH), (f"{BATCH} tasks", tasks)):
            held = hold(engine, chosen, raw)
            parts = engine.planner.plan([row.resident.place.layout for row in held])
            passes = [(images[part], gather([held[index].resident.place for index in part])) for part in parts]
            shares: list[float] = []
            compute = partial(engine.compute, held)
            calls: dict[str, Callable[[], object]] = {
                FORWARD: partial(_forward, backbone, passes),
                COMPUTE: partial(_shared, compute, shares) if backbone.device.type == "cpu" else compute,
            }
            times = setting.time(calls)
            extra = {COMPUTE: {"own share, %": 100 * statistics.median(shares[1:])}} if shares else {}
            rows += setting.rows("overhead", f"batch {BATCH}, {case}", BATCH, times, extra)
    return rows


def _forward(backbone: Backbone, passes: list[tuple[Tensor, AdapterBatch]]) -> None:
    model = backbone.model
    for images, adapter in passes:
        tapped_features(model, embed(model, images), adapter)


def _shared(compute: Callable[[], object], shares: list[float]) -> None:
    with _timed_forward() as inside:
        began = time.perf_counter()
        compute()
        whole = time.perf_counter() - began
    shares.append(1 - sum(inside) / whole)


@contextmanager
def _timed_forward() -> Iterator[list[float]]:
    """Give the seconds of each call that the engine makes of the forward pass."""
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            seconds.append(time.perf_counter() - began)
            return result

        return call

    with (
        mock.patch.object(engine_module, "embed", timed(embed)),
        mock.patch.object(engine_module, "tapped_features", timed(tapped_features)),
    ):
        yield seconds
