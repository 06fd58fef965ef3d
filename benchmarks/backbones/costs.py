"""What training, taps and shifts cost on vit-small-14, as ratios within rounds in which variants take turns.

    python benchmarks/backbones/costs.py --data ../shared/data/flowers12

- training: images a second of gated prompts that enter block 9, after the first epoch, by those that enter block 0;
- instant: CPU time of ``gpt-serve train --recipe instant`` from images in memory to the published adapter and its card,
  by that of one plain pass of timm's backbone over the images of ``train``, of which validation is a part;
- serving: CPU time of 32 images for 32 gated adapters with four taps, with shifts, and with both, by that of as many
  with neither.

Writes ``costs.json`` beside this file and prints it.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.bench.setting import CLASSES, hold, pixels, temporary_store, untrained_adapter, write
from gpt_serve.bench.timing import Ratio
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import SMALL
from gpt_serve.specs import Tap
from gpt_serve.train.checkpoint import held, run_folder
from gpt_serve.train.data.datasets import Dataset, open_dataset
from gpt_serve.train.data.views import ordered_batches
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import load_views, new_trainer, train_on
from gpt_serve.train.inputs import normalized
from gpt_serve.train.job import Silent, TrainingJob, Views
from gpt_serve.train.loop import EVAL_BATCH
from gpt_serve.train.recipes.recipe import make_recipe

TAPS = (Tap(11, "cls"), Tap(10, "cls"), Tap(9, "cls"), Tap(9, "patches"))
EPOCHS, IMAGES = 3, 32  # of a training run
TASKS = 32  # in a batch that is served, which has as many images


def views_of(backbone: Backbone, job: TrainingJob, dataset: Dataset) -> Views:
    """The images of ``dataset`` as ``job`` has them."""
    return load_views(dataset, backbone.spec.preprocess, job, Silent())


def training(backbone: Backbone, data: str, rounds: int) -> dict[str, list[float]]:
    """Seconds an image in the epochs after the first of each round's run."""
    dataset = open_dataset(data, 0)
    few = dataclasses.replace(dataset, train=dataset.train[:IMAGES], val=dataset.val[:2], test=())
    seconds: dict[str, list[float]] = {"prompts from block 0": [], "prompts from block 9": []}
    for _ in range(rounds):
        for block, taken in zip((0, 9), seconds.values(), strict=True):
            recipe = make_recipe("adamw", first_block=block, views=1, epochs=EPOCHS)
            job = TrainingJob("flowers", data, Path(), recipe, workers=0)
            trainer = new_trainer(backbone, job, views_of(backbone, job, few), Silent(), World())
            history = trainer.fit(Silent().batch, Silent().epoch).history
            taken.append(float(np.mean([1 / record.images_per_second for record in history[1:]])))
    return seconds


def instant(backbone: Backbone, data: str, rounds: int) -> dict[str, list[float]]:
    """As `in_turns` measures them: a plain pass, and the recipe on the same images."""
    recipe = make_recipe("instant")
    job = TrainingJob("flowers", data, Path(), recipe, workers=0)
    views = dataclasses.replace(views_of(backbone, job, open_dataset(data, recipe.seed)), test=None)

    @torch.no_grad()
    def plain() -> None:
        for view in (views.train.drawn("none"), views.val):
            for images, _ in view.batches(ordered_batches(len(view), EVAL_BATCH), 0):
                backbone.timm_model(normalized(images, view.preprocess))

    def published() -> None:
        with tempfile.TemporaryDirectory() as adapters, held(run_folder(Path(adapters), job.task)):
            own = dataclasses.replace(job, adapters=Path(adapters))
            train_on(backbone, views, own, Silent(), World(), time.perf_counter())

    return in_turns({"plain pass": plain, "instant, published": published}, rounds)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the process's CPU time, which other programs disturb less than the clock; A B, then B A."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name in sorted(calls, key=list(calls).index, reverse=done % 2 == 1):
            began = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - began)
    return seconds


def adapter(backbone: Backbone, task: str, *, taps: bool, shifts: bool) -> Adapter:
    """An untrained gated adapter with four taps or the last block's, with shifts or without."""
    plain, spec = untrained_adapter(backbone, task), backbone.spec
    fields: dict[str, Any] = {}
    if taps:
        fields |= {"taps": TAPS, "head_weight": 0.02 * torch.randn(CLASSES, len(TAPS) * spec.width)}
    if shifts:
        fields["shift"] = 0.01 * torch.randn(spec.depth, 3, spec.width)
    return dataclasses.replace(plain, **fields)


def serving(backbone: Backbone, rounds: int) -> dict[str, list[float]]:
    """Seconds of the process's CPU time of a batch for adapters of each kind."""
    kinds = {
        "neither": {"taps": False, "shifts": False},
        "taps": {"taps": True, "shifts": False},
        "shifts": {"taps": False, "shifts": True},
        "taps and shifts": {"taps": True, "shifts": True},
    }
    calls: dict[str, Callable[[], object]] = {}
    with temporary_store(backbone) as store:
        for kind, fields in kinds.items():
            for index in range(TASKS):
                write(store, adapter(backbone, f"{kind.replace(' ', '-')}-{index}", **fields))
        with Engine(backbone, store) as engine:
            for kind in kinds:
                tasks = [f"{kind.replace(' ', '-')}-{index}" for index in range(TASKS)]
                rows = hold(engine, tasks, pixels(backbone, TASKS))
                calls[kind] = lambda rows=rows: engine.compute(rows)  # type: ignore[misc]
            in_turns(calls, 1)  # warm
            return in_turns(calls, rounds)


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median seconds of each variant, and median and quartiles of its ratio to the first."""
    base = next(iter(times.values()))
    return {
        name: {"seconds": float(np.median(seconds)), "rounds": len(seconds)}
        | dataclasses.asdict(Ratio.of(seconds, base))
        for name, seconds in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="flowers12")
    parser.add_argument("--only", choices=("training", "instant", "serving"), nargs="*", default=())
    parser.add_argument(
        "--rounds", type=int, default=3, help="of training and instant; serving takes three times as many"
    )
    arguments = parser.parse_args()
    reuse_freed_memory()
    backbone = Backbone.load(SMALL.name)
    parts: dict[str, Callable[[], dict[str, list[float]]]] = {
        "training": lambda: training(backbone, arguments.data, arguments.rounds),
        "instant": lambda: instant(backbone, arguments.data, arguments.rounds),
        "serving": lambda: serving(backbone, 3 * arguments.rounds),
    }
    path = Path(__file__).with_name("costs.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, measure in parts.items():
        if not arguments.only or name in arguments.only:
            results[name] = ratios(measure())
            print(name, json.dumps(results[name], indent=1))
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
