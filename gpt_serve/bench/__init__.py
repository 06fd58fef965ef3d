"""Benchmarks: each compares the project with what it is built on or what users would pick instead, as ratios.

timing.py    interleaved rounds and the ratios of their times
setting.py   what each benchmark is given: backbone, scale, adapters and images that need no download
curves.py    prompts in a batch, tasks in a batch
engines.py   torch against onnxruntime
peers.py     the engine against bare timm, swapped adapters, PEFT (lora.py) and the authors' loop (authors.py)
bank.py      adapters that come and go
overhead.py  the engine's own work
http.py      the engine alone against the HTTP server
soak.py      memory under churn
report.py    records, tables, JSON; targets.py holds them against stated bounds, plots.py draws them
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from gpt_serve.bench.bank import bench_bank, bench_cold
from gpt_serve.bench.curves import bench_mixed, bench_prompts, bench_tasks
from gpt_serve.bench.engines import bench_engines
from gpt_serve.bench.http import bench_http
from gpt_serve.bench.overhead import bench_overhead
from gpt_serve.bench.peers import bench_peers
from gpt_serve.bench.report import Record, machine_facts
from gpt_serve.bench.setting import Setting
from gpt_serve.bench.soak import bench_soak
from gpt_serve.bench.timing import Plan, Row
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import TINY

SMALL, BASE = "vit_small_patch16_224", "vit_base_patch16_224"
Benchmark = Callable[[Setting], list[Row]]

BENCHMARKS: dict[str, tuple[Benchmark, Sequence[str]]] = {
    "peers": (bench_peers, (TINY.name, SMALL, BASE)),
    "mixed": (bench_mixed, (TINY.name, SMALL)),
    "tasks": (bench_tasks, (TINY.name, SMALL, BASE)),
    "prompts": (bench_prompts, (TINY.name, SMALL, BASE)),
    "engines": (bench_engines, (TINY.name, SMALL)),
    "bank": (bench_bank, (TINY.name, SMALL)),
    "cold": (bench_cold, (BASE,)),
    "overhead": (bench_overhead, (TINY.name, SMALL)),
    "http": (bench_http, (TINY.name, SMALL)),
    "soak": (bench_soak, (TINY.name,)),
}
"""Each benchmark, and the backbones that it measures unless told otherwise."""
ONLY_NAMED = ("soak",)
"""Those that are part of a run only when it names them."""


def run_benchmarks(
    only: Sequence[str], backbones: Sequence[str], device: str, plan: Plan, say: Callable[[str], None] = print
) -> Iterator[Record]:
    """Run benchmarks one after another, each on its backbones; those that aren't bundled get random weights.

    Args:
        only: names out of `BENCHMARKS`; empty means all but `ONLY_NAMED`.
        backbones: for all of them; empty means each benchmark's own.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        say: called with a line per benchmark and backbone when it begins.

    Raises:
        BackboneError: a backbone cannot be built.
        GPTServeError: the server or the engine failed a request.
    """
    for name in only or [name for name in BENCHMARKS if name not in ONLY_NAMED]:
        benchmark, own = BENCHMARKS[name]
        for backbone in backbones or own:
            say(f"{name}: {backbone}")
            machine = machine_facts(device)  # first: it notes how busy the machine is
            torch.manual_seed(0)
            setting = Setting.of(Backbone.load(backbone, device=device, pretrained=False), plan)
            yield Record(name, backbone, machine, plan, benchmark(setting))
