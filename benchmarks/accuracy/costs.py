"""What methods cost to train, to start from data and to serve.

    python benchmarks/accuracy/costs.py

Training is a step of 16 images, serving the answers of the engine that ``serve`` starts; what starts from the training
images is told in epochs of gated prompts on the same images. All are timed in turns, with 10 prompts and the bundled
backbone. Writes ``costs.json`` and ``costs.md``.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.engines import onnx_engine
from gpt_serve.bench.setting import CLASSES, answer, photo, untrained_adapter
from gpt_serve.bench.timing import Plan, Ratio, interleave
from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.images.decode import decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import TINY
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.fit import build_module, load_views
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Silent, TrainingJob
from gpt_serve.train.loop import forward_logits
from gpt_serve.train.methods.start import start_from_data
from gpt_serve.train.recipes.recipe import make_recipe

HERE = Path(__file__).parent
METHODS = ("linear", "vpt-shallow", "vpt-deep", "gated", "gated-deep", "full")
PROMPTS, STEP = 10, 16
BATCHES = (1, 8, 32)
IMAGES = 128  # that a start is timed on
STARTS: dict[str, dict[str, Any]] = {
    "tokens, shallow": {"method": "gated", "prompt_init": "tokens"},
    "tokens, deep": {"method": "spt-deep"},
    "k-means, deep": {"method": "vpt-deep", "prompt_init": "kmeans"},
    "standardised features": {"method": "linear", "norm": "standard"},
    "head from LDA": {"method": "linear", "norm": "standard", "head_init": "lda"},
    "recipe lda": {"method": "gated", "prompt_init": "tokens", "norm": "standard", "head_init": "lda"},
}


def training_step(backbone: Backbone, method: str) -> Callable[[], None]:
    """Forward and backward of a batch."""
    module = build_module(backbone, make_recipe("adamw", method=method, prompts=PROMPTS), CLASSES).train()
    images = torch.randint(0, 256, (STEP, 3, *backbone.spec.preprocess.input_size), dtype=torch.uint8)
    targets = torch.arange(STEP) % CLASSES

    def step() -> None:
        module.zero_grad()
        F.cross_entropy(forward_logits(backbone, module, images, backbone.spec.preprocess), targets).backward()

    return step


def start(backbone: Backbone, settings: dict[str, Any]) -> Callable[[], None]:
    """What is done once before training, on `IMAGES` images."""
    dataset = open_dataset("digits", 0)
    job = TrainingJob("digits", "digits", Path(), make_recipe("adamw", prompts=PROMPTS, **settings), workers=0)
    few = replace(dataset, train=dataset.train[:IMAGES], val=dataset.val[:1], test=())
    view = load_views(few, backbone.spec.preprocess, job, Silent()).train
    module = build_module(backbone, job.recipe, len(dataset.labels))
    return lambda: start_from_data(backbone, module, job, view, Inputs(0), Silent())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="rounds of a comparison")
    plan = Plan(parser.parse_args().repeats, comparison_seconds=60)
    reuse_freed_memory()
    backbone = Backbone.load(TINY.name)
    times = {"training": interleave({method: training_step(backbone, method) for method in METHODS}, plan)}
    starts = {name: start(backbone, settings) for name, settings in STARTS.items()}
    started = interleave({"gated": training_step(backbone, "gated"), **starts}, plan)
    served = [method for method in METHODS if method != "full"]
    with TemporaryDirectory() as name:
        store = AdapterStore(Path(name) / "adapters", backbone.spec)
        for method in served:
            store.publish(untrained_adapter(backbone, method, method, PROMPTS))
        engine = onnx_engine(backbone, store, max_batch=max(BATCHES))
        pixels = [preprocess_image(decode(photo(seed)), backbone.spec.preprocess) for seed in range(max(BATCHES))]
        for batch in BATCHES:
            variants = {
                method: lambda method=method, batch=batch: answer(engine, [(method, item) for item in pixels[:batch]])
                for method in served
            }
            times[f"serving, batch {batch}"] = interleave(variants, plan)
    write(times, started)


def write(times: dict[str, dict[str, list[float]]], started: dict[str, list[float]]) -> None:
    """A row for each method: median over the rounds of its time by the linear probe's, and the probe's milliseconds.

    Args:
        times: seconds of each round, by what is done and the method.
        started: of each start, and of a step of ``gated``.
    """
    lines = [f"| method | {' | '.join(times)} |", "|---|" + "---|" * len(times)]
    ratios = {
        what: {method: Ratio.of(seconds, rounds["linear"]).median for method, seconds in rounds.items()}
        for what, rounds in times.items()
    }
    for method in METHODS:
        cells = [f"{ratios[what][method]:.2f}" if method in ratios[what] else "not served" for what in times]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    base = {what: 1000 * float(np.median(rounds["linear"])) for what, rounds in times.items()}
    lines.append(f"| linear, ms | {' | '.join(f'{value:.1f}' for value in base.values())} |")
    epoch = np.array(started["gated"]) * IMAGES / STEP
    epochs = {name: Ratio.of(started[name], epoch.tolist()).median for name in STARTS}
    lines += ["", "| start from data | epochs of gated prompts |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in epochs.items()]
    (HERE / "costs.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {"ratios": ratios, "linear_ms": base, "start_epochs": epochs}
    (HERE / "costs.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
