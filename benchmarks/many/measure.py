"""Many tasks of one image by the engine: ratios of interleaved calls, printed as a table.

    python benchmarks/many/measure.py [ROUNDS]

Adapters are random: what they answer takes as long as what trained ones answer.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping

import torch

from gpt_serve import AdapterStore, Backbone, Engine
from gpt_serve.adapters.adapter import Adapter
from gpt_serve.bench.timing import Plan, interleave
from gpt_serve.engine.engine import TorchForward
from gpt_serve.engine.trunks import CachedForward, TrunkCache

TASKS, CLASSES, PROMPTS, FIRST_BLOCK = 64, 10, 10, 9


def adapter(backbone: Backbone, task: str, *, late: bool, seed: int) -> Adapter:
    """A probe, or prompts that enter block `FIRST_BLOCK` with a probe behind them."""
    spec, generator = backbone.spec, torch.Generator().manual_seed(seed)
    prompts = {
        "prompt": torch.randn(1, PROMPTS, spec.width, generator=generator),
        "gamma": torch.zeros(spec.depth - 1 - FIRST_BLOCK),
        "first_block": FIRST_BLOCK,
    }
    return Adapter(
        task=task,
        method="gated" if late else "linear",
        backbone=spec.name,
        backbone_sha256=spec.fingerprint,
        labels=tuple(map(str, range(CLASSES))),
        pool=spec.pool,
        preprocess=spec.preprocess,
        training={},
        created="2026-01-01T00:00:00Z",
        head_weight=torch.randn(CLASSES, spec.width, generator=generator),
        head_bias=torch.zeros(CLASSES),
        **(prompts if late else {}),
    )


def calls(backbone: Backbone, store: AdapterStore) -> Mapping[str, Callable[[], object]]:
    """What is compared: the base of each ratio, and what is divided by it."""
    for seed in range(TASKS):
        for kind in ("probe", "late"):
            store.publish(adapter(backbone, f"{kind}-{seed}", late=kind == "late", seed=seed))
    height, width = backbone.spec.preprocess.input_size
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    probes, late = ([f"{kind}-{seed}" for seed in range(TASKS)] for kind in ("probe", "late"))
    engine = Engine(backbone, store)
    cached = Engine(backbone, store, forward=CachedForward(backbone, TorchForward(backbone), TrunkCache(2**24)))
    return {
        "one probe": lambda: engine.predict([("probe-0", image)]),
        "64 probes": lambda: engine.predict([(probes, image)]),
        "64 late, apart": lambda: [engine.predict([(task, image)]) for task in late],
        "64 late": lambda: engine.predict([(late, image)]),
        "one late": lambda: engine.predict([("late-0", image)]),
        "one late, image known": lambda: cached.predict([("late-1", image)]),
        "one probe, image known": lambda: cached.predict([("probe-1", image)]),
    }


RATIOS = (
    ("64 probes", "one probe"),
    ("64 late", "64 late, apart"),
    ("one probe, image known", "one probe"),
    ("one late, image known", "one late"),
)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    backbone = Backbone.load("vit-small-14")
    with tempfile.TemporaryDirectory() as folder:
        times = interleave(calls(backbone, AdapterStore(folder)), Plan(repeats=rounds, comparison_seconds=90))
    print("| time of | by that of | ratio, median | quartiles |\n|---|---|---|---|")
    for name, base in RATIOS:
        each = [one / other for one, other in zip(times[name], times[base], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        print(f"| {name} | {base} | {middle:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
