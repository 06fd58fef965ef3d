"""Adapters that come and go: a bank that holds 100 of many, and the first answer of a cold adapter."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
from setting import PROMPTS, Setting, engine_holding, gated, pixels, temporary_store, write
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.mixed import answer
from gpt_serve.bench.timing import Row, interleave, to_rows
from gpt_serve.engine.engine import Engine

HELD = 100
BATCH = 64
RESIDENT, HOST, DISK = (
    "all resident",
    f"{HELD} on the device, all in host memory",
    f"{HELD} on the device, rest on disk",
)
COLD_PROMPTS = 100
COLD_KINDS = {"gated, open": {}, "gated, closed": {"closed": True}, "deep": {"deep": True}}


def bench_bank(setting: Setting) -> list[Row]:
    """1 to 10,000 adapters on disk, in batches of 64 requests; the base has all of them in its bank."""
    rows: list[Row] = []
    with temporary_store(setting.backbone) as store:
        tasks: list[str] = []
        like = gated(setting.backbone, "like", PROMPTS)  # of equal content: files of their own names are all it takes
        for count in setting.scale.bank_counts:
            for index in range(len(tasks), count):
                tasks.append(f"task-{index:05}")
                write(store, dataclasses.replace(like, task=tasks[-1]))
            engines = _engines(setting, store, count, like)
            for engine in (engines[RESIDENT], engines[HOST]):
                for task in tasks:  # from here on no disk
                    with engine.bank.holding(task):
                        pass
            for exponent in setting.scale.exponents:
                rows += _traffic(setting, engines, tasks, exponent)
    return rows


def _engines(setting: Setting, store: AdapterStore, count: int, like: Adapter) -> dict[str, Engine]:
    backbone = setting.backbone
    return {
        RESIDENT: engine_holding(store, backbone, count, like),
        HOST: engine_holding(store, backbone, HELD, like),
        DISK: engine_holding(store, backbone, HELD, like, host=0),
    }


def _traffic(setting: Setting, engines: dict[str, Engine], tasks: Sequence[str], exponent: float) -> list[Row]:
    """All engines answer the same requests, new ones in each round."""
    images, batches = pixels(setting.backbone, BATCH), setting.scale.bank_batches
    calls = {variant: Stream(engine, tasks, exponent, images, batches) for variant, engine in engines.items()}
    for call in calls.values():
        call.settle()
    before = {variant: engine.bank.stats() for variant, engine in engines.items()}
    times = interleave(calls, setting.plan)
    extra = {}
    for variant, engine in engines.items():
        now, then = engine.bank.stats(), before[variant]
        taken, loads = now.hits + now.loads - then.hits - then.loads, now.loads - then.loads
        extra[variant] = {"hit rate": 1 - loads / taken}
        if loads:
            extra[variant]["ms/load"] = 1000 * (now.load_seconds - then.load_seconds) / loads
    case = f"{len(tasks):,} on disk, {f'Zipf({exponent})' if exponent else 'uniform'}"
    return to_rows("bank", setting.backbone.name, case, batches * BATCH, times, extra)


class Stream:
    """A call that answers the next batches of one stream of requests; equal arguments give equal streams."""

    def __init__(
        self, engine: Engine, tasks: Sequence[str], exponent: float, images: Sequence[Tensor], batches: int
    ) -> None:
        self.engine, self.images, self.batches = engine, images, batches
        self._tasks = tasks_at_random(tasks, exponent)

    def settle(self) -> None:
        """Look the tasks of many requests up, so that the bank holds what it would after a while."""
        for task in islice(self._tasks, 20 * HELD):
            with self.engine.bank.holding(task):
                pass

    def __call__(self) -> None:
        for _ in range(self.batches):
            answer(self.engine, list(zip(islice(self._tasks, len(self.images)), self.images, strict=True)))


def tasks_at_random(tasks: Sequence[str], exponent: float) -> Iterator[str]:
    """Tasks at random for ever: the one of rank ``k`` with weight ``k ** -exponent``."""
    generator = np.random.default_rng(0)
    weights = np.arange(1, len(tasks) + 1) ** -exponent
    while True:
        for index in generator.choice(len(tasks), 4096, p=weights / weights.sum()):
            yield tasks[index]


def bench_cold(setting: Setting) -> list[Row]:
    """One request for an adapter that only the disk has, then the same again: what is beyond the second's time.

    The adapter files were just written: they are in the system's page cache, as those of a busy server are.
    """
    rows: list[Row] = []
    backbone, image = setting.backbone, pixels(setting.backbone, 1)[0]
    for kind, options in COLD_KINDS.items():
        with temporary_store(backbone) as store:
            adapters = [
                gated(backbone, f"cold-{index}", COLD_PROMPTS, **options) for index in range(setting.scale.cold)
            ]
            for adapter in adapters:
                write(store, adapter)
            engine = Engine(backbone, store, host_bytes=0)
            times: dict[str, list[float]] = {"resident": [], "from disk": []}
            loads: list[float] = []
            for index, adapter in enumerate(adapters):
                request = partial(answer, engine, [(adapter.task, image)])
                before = engine.bank.stats().load_seconds
                cold, warm = _seconds(request), _seconds(request)
                loads.append(engine.bank.stats().load_seconds - before)
                if index:  # the first is the warm-up
                    times["resident"].append(warm)
                    times["from disk"].append(cold)
        beyond = [1000 * (cold - warm) for warm, cold in zip(*times.values(), strict=True)]
        q1, median, q3 = statistics.quantiles(beyond, n=4)
        extra = {"beyond ms": median, "q1": q1, "q3": q3, "of which loading": 1000 * statistics.median(loads[1:])}
        case = f"one image, {COLD_PROMPTS} prompts, {kind}"
        rows += to_rows("cold", backbone.name, case, 1, times, {"from disk": extra})
    return rows


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
