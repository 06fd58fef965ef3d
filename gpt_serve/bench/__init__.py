"""Benchmarks: prompts, mixed batches and HTTP, each against what it is built on, as ratios within one run.

timing.py    interleaved rounds and the ratios of their times
inputs.py    adapters and images that need no download
forward.py   bare timm forward pass - prompted forward pass
mixed.py     a batch of one task - a mixed batch
engines.py   torch - onnxruntime
http.py      the engine alone - the HTTP server, saturated
report.py    machine facts, tables, JSON
"""

from collections.abc import Callable, Sequence

from gpt_serve.bench.engines import bench_engines
from gpt_serve.bench.forward import bench_forward
from gpt_serve.bench.http import bench_http
from gpt_serve.bench.mixed import bench_mixed
from gpt_serve.bench.report import Report, machine_facts
from gpt_serve.bench.timing import Plan, Row
from gpt_serve.model.backbone import Backbone

BENCHMARKS: dict[str, Callable[[Backbone, Plan], list[Row]]] = {
    "forward": bench_forward,
    "mixed": bench_mixed,
    "engines": bench_engines,
    "http": bench_http,
}


def run_benchmarks(
    names: Sequence[str], device: str, plan: Plan, only: Sequence[str] = (), say: Callable[[str], None] = print
) -> Report:
    """Run the benchmarks on each backbone; those that aren't bundled get random weights, which take the same time.

    Args:
        names: of backbones; ``http`` takes minutes with a large one and runs on the first only.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        only: names out of `BENCHMARKS`; empty means all.
        say: called with a line per benchmark when it begins.

    Raises:
        BackboneError: a backbone cannot be built.
        GPTServeError: the server or the engine failed a request.
    """
    machine = machine_facts(device)  # first: it notes how busy the machine is
    backbones = [Backbone.load(name, device=device, pretrained=False) for name in names]
    rows: list[Row] = []
    for name in [name for name in BENCHMARKS if name in (only or BENCHMARKS)]:
        for backbone in backbones[:1] if name == "http" else backbones:
            say(f"{name}: {backbone.name}")
            rows += BENCHMARKS[name](backbone, plan)
    return Report(machine, plan, rows)
