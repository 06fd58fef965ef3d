"""The engine against its peers and its targets, in one run.

    python benchmarks/engine/run.py                                    # about 20 minutes on two cores
    python benchmarks/engine/run.py --only peers --backbone vit_small_patch16_224 --rounds 10
    python benchmarks/engine/run.py --only soak --only http            # not part of a run unless named

Writes ``results.json``, ``tables.md`` and plots into ``--output``. A part that is measured again replaces what is
there, and what was measured stays if a later part fails: a run may be made piece by piece. Backbones that aren't
bundled get random weights, which take the same time.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # variants take turns: none may burn what the next one needs

import torch  # noqa: E402
from churn import bench_bank, bench_cold  # noqa: E402
from curves import bench_prompts, bench_tasks  # noqa: E402
from overhead import bench_overhead  # noqa: E402
from passes import bench_passes  # noqa: E402
from peers import bench_peers  # noqa: E402
from plots import draw  # noqa: E402
from record import Record, facts, merged, read, save, summary, tables  # noqa: E402
from setting import Setting  # noqa: E402
from soak import bench_soak  # noqa: E402

from gpt_serve.bench.http import bench_http  # noqa: E402
from gpt_serve.bench.timing import Plan, Row  # noqa: E402
from gpt_serve.engine.malloc import reuse_freed_memory  # noqa: E402
from gpt_serve.model.backbone import Backbone  # noqa: E402
from gpt_serve.model.catalog import TINY  # noqa: E402

HERE = Path(__file__).parent
SMALL, BASE = "vit_small_patch16_224", "vit_base_patch16_224"
Part = Callable[[Setting], list[Row]]


def bench_saturated(setting: Setting) -> list[Row]:
    """HTTP with 64 clients."""
    return bench_http(setting.backbone, setting.plan, clients=(64,))


PARTS: dict[str, Part] = {
    "peers": bench_peers,
    "tasks": bench_tasks,
    "prompts": bench_prompts,
    "bank": bench_bank,
    "cold": bench_cold,
    "overhead": bench_overhead,
    "http": bench_saturated,
    "soak": bench_soak,
    "passes": bench_passes,
}
# What a run without --only measures, and on which backbones.
DEFAULT = {
    "peers": (TINY.name, SMALL, BASE),
    "tasks": (TINY.name, SMALL, BASE),
    "prompts": (TINY.name, SMALL, BASE),
    "bank": (TINY.name, SMALL),
    "cold": (BASE,),
    "overhead": (TINY.name, SMALL),
}
NAMED = {"http": (SMALL,), "soak": (TINY.name,), "passes": (TINY.name, SMALL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="repeat for more parts")
    parser.add_argument("--backbone", action="append", help="timm name or the bundled one; repeat for more")
    parser.add_argument("--rounds", type=int, default=20, help="most rounds of a comparison")
    parser.add_argument("--seconds", type=float, default=10, help="a comparison ends after this and 3 rounds")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    options = parser.parse_args()
    reuse_freed_memory()  # as every command of gpt-serve does
    options.output.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.rounds, comparison_seconds=options.seconds)
    jobs = [
        (name, backbone)
        for name in (options.only or DEFAULT)
        for backbone in (options.backbone or (DEFAULT | NAMED)[name])
    ]
    for name, backbone in jobs:
        measure(name, backbone, plan, options.device, options.output)
    records = read(options.output)
    draw(records, options.output)
    print(summary(records).markdown())


def measure(name: str, backbone: str, plan: Plan, device: str, folder: Path) -> None:
    """One part on one backbone, printed and merged into the results."""
    print(f"{time.strftime('%H:%M:%S')} {name}: {backbone}", flush=True)
    machine, began = facts(device), time.perf_counter()
    torch.manual_seed(0)
    setting = Setting.of(Backbone.load(backbone, device=device, pretrained=False), plan)
    rows = PARTS[name](setting)
    record = Record(name, backbone, machine, plan, (time.perf_counter() - began) / 60, tuple(rows))
    for table in tables(record):
        print(table.markdown(), flush=True)
    save(folder, merged(read(folder), record, list(PARTS)))


if __name__ == "__main__":
    main()
