"""Adapters that come and go: a bank that holds 100 of many, and the first answer of a cold adapter."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.setting import Setting, answer, pixels, temporary_store, untrained_adapter, write
from gpt_serve.bench.timing import Row
from gpt_serve.engine.bank import DEFAULT_HOST_BYTES
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.slab import Packed
from gpt_serve.model.backbone import Backbone

HELD = 100
BATCH = 64
RESIDENT = "all resident"
HOST, DISK = f"{HELD} on the device, all in host memory", f"{HELD} on the device, rest on disk"
COLD_PROMPTS = 100
COLD_KINDS = {"gated, open": ("gated", False), "gated, closed": ("gated", True), "deep": ("vpt-deep", False)}


def bench_bank(setting: Setting) -> list[Row]:
    """Compare engines on 1 to 10,000 adapters on disk, in batches of 64; the base has all of them in its bank."""
    rows: list[Row] = []
    with temporary_store(setting.backbone) as store:
        tasks: list[str] = []
        like = untrained_adapter(setting.backbone, "like")  # of equal content: files of their own are all it takes
        for count in setting.scale.bank_counts:
            for index in range(len(tasks), count):
                tasks.append(f"task-{index:05}")
                write(store, dataclasses.replace(like, task=tasks[-1]))
            engines = {
                RESIDENT: engine_holding(store, setting.backbone, count, like),
                HOST: engine_holding(store, setting.backbone, HELD, like),
                DISK: engine_holding(store, setting.backbone, HELD, like, host=0),
            }
            for engine in (engines[RESIDENT], engines[HOST]):
                look_up(engine, tasks)  # from here on no disk
            for exponent in setting.scale.exponents:
                rows += _traffic(setting, engines, tasks, exponent)
    return rows


def _traffic(setting: Setting, engines: dict[str, Engine], tasks: Sequence[str], exponent: float) -> list[Row]:
    """Let all engines answer the same requests, new ones in each round."""
    images, batches = pixels(setting.backbone, BATCH), setting.scale.bank_batches
    calls: dict[str, Callable[[], object]] = {}
    for variant, engine in engines.items():
        stream = tasks_at_random(tasks, exponent)
        look_up(engine, islice(stream, 20 * HELD))  # so that the bank holds what it would after a while
        calls[variant] = partial(_answer_next, engine, stream, images, batches)
    before = {variant: engine.bank.stats() for variant, engine in engines.items()}
    times = setting.time(calls)
    extra = {}
    for variant, engine in engines.items():
        now, then = engine.bank.stats(), before[variant]
        loads = now.loads - then.loads
        extra[variant] = {"hit rate": 1 - loads / (now.hits - then.hits + loads)}
        if loads:
            extra[variant]["ms/load"] = 1000 * (now.load_seconds - then.load_seconds) / loads
    case = f"{len(tasks):,} on disk, {f'Zipf({exponent})' if exponent else 'uniform'}"
    return setting.rows("bank", case, batches * BATCH, times, extra)


def _answer_next(engine: Engine, stream: Iterator[str], images: Sequence[Tensor], batches: int) -> None:
    for _ in range(batches):
        answer(engine, list(zip(islice(stream, len(images)), images, strict=True)))


def look_up(engine: Engine, tasks: Sequence[str] | Iterator[str]) -> None:
    """Have the bank load what it does not hold of ``tasks``, one after another."""
    for task in tasks:
        with engine.bank.holding(task):
            pass


def tasks_at_random(tasks: Sequence[str], exponent: float) -> Iterator[str]:
    """Draw tasks for ever, that of rank ``k`` with weight ``k ** -exponent``; equal arguments give equal streams."""
    generator = np.random.default_rng(0)
    weights = np.arange(1, len(tasks) + 1) ** -exponent
    while True:
        for index in generator.choice(len(tasks), 4096, p=weights / weights.sum()):
            yield tasks[index]


def engine_holding(
    store: AdapterStore, backbone: Backbone, count: int, like: Adapter, *, host: int | None = None
) -> Engine:
    """Make an engine whose bank holds ``count`` adapters of the same shape as ``like``.

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


def bench_cold(setting: Setting) -> list[Row]:
    """Time a request for an adapter that only the disk has, then the same again, which has it in the bank.

    The adapter files were just written: they are in the system's page cache, as those of a busy server are.
    """
    return [row for kind, made in COLD_KINDS.items() for row in _cold(setting, kind, *made)]


def _cold(setting: Setting, kind: str, method: str, closed: bool) -> list[Row]:
    backbone, image = setting.backbone, pixels(setting.backbone, 1)[0]
    times: dict[str, list[float]] = {"resident": [], "from disk": []}
    loads: list[float] = []
    with temporary_store(backbone) as store:
        engine = Engine(backbone, store, host_bytes=0)
        for index in range(setting.scale.cold):
            adapter = untrained_adapter(backbone, f"cold-{index}", method, COLD_PROMPTS, closed=closed)
            write(store, adapter)
            request = partial(answer, engine, [(adapter.task, image)])
            before = engine.bank.stats().load_seconds
            cold, warm = _seconds(request), _seconds(request)
            if index:  # the first is the warm-up
                loads.append(engine.bank.stats().load_seconds - before)
                times["resident"].append(warm)
                times["from disk"].append(cold)
    beyond = [1000 * (cold - warm) for warm, cold in zip(*times.values(), strict=True)]
    q1, median, q3 = statistics.quantiles(beyond, n=4)
    extra = {"beyond ms": median, "q1": q1, "q3": q3, "of which loading": 1000 * statistics.median(loads)}
    return setting.rows("cold", f"one image, {COLD_PROMPTS} prompts, {kind}", 1, times, {"from disk": extra})


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
