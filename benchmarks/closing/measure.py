"""How many gates of the shipped adapters close, what that costs in accuracy, and what serving them gains.

    python benchmarks/closing/measure.py --data ../shared/data

Copies ``adapters/mae-vit-tiny-32`` to ``--work`` and runs ``gpt-serve close-gates`` there, on ``DATA/flowers12``,
``DATA/caltech101`` and the built-in digits; a step that is done is not repeated. Then times the forward pass before and
after, in turns. Writes ``results.json`` and ``table.md`` beside this file.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.timing import Plan, Ratio, interleave
from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.catalog import TINY
from gpt_serve.model.prompted import embed, prompted_features, remember

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "adapters" / TINY.name
TASKS = {"flowers": "flowers12", "caltech101": "caltech101", "digits": None}
BATCH = 32
PROMPTS = (10, 100)  # as trained; as in the paper's recipe


def close(task: str, data: Path, work: Path) -> dict[str, Any]:
    """What ``gpt-serve close-gates --json`` prints for the copy of ``task`` in ``work``."""
    result = work / f"{task}.json"
    if not result.exists():
        shutil.copytree(SHIPPED / task, work / "adapters" / task, dirs_exist_ok=True)
        folder = TASKS[task]
        command = [
            str(Path(sys.executable).with_name("gpt-serve")),
            "close-gates",
            "--json",
            "--backbone",
            TINY.name,
            "--task",
            task,
        ]
        command += ["--data", "digits" if folder is None else str(data / folder), "--device", "cpu"]
        command += ["--adapters", str(work / "adapters")]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        result.write_bytes(output)
    return json.loads(result.read_text(encoding="utf-8"))["closing"]


def forward(backbone: Backbone, adapter: Adapter, prompts: int) -> Callable[[], None]:
    """A batch of images through ``adapter``, as it is served: what is constant about its prompts is remembered."""
    assert adapter.prompt is not None
    if prompts != adapter.prompts:  # their values do not change the time
        adapter = dataclasses.replace(
            adapter, prompt=torch.randn(adapter.prompt.shape[0], prompts, backbone.spec.width)
        )
    images = torch.randn(BATCH, 3, *backbone.spec.preprocess.input_size)
    with torch.inference_mode():
        tensors = remember(backbone.model, AdapterBatch.of(adapter, backbone.spec, "cpu"))

    @torch.inference_mode()
    def call() -> None:
        prompted_features(backbone.model, embed(backbone.model, images), tensors)

    return call


def speed(backbone: Backbone, task: str, work: Path, prompts: int, plan: Plan) -> dict[str, Any]:
    """Milliseconds per image, and the ratios within each round."""
    images = torch.randn(BATCH, 3, *backbone.spec.preprocess.input_size)

    @torch.inference_mode()
    def bare() -> None:
        backbone.timm_model(images)

    before, after = (AdapterStore(root).load(task).adapter for root in (SHIPPED, work / "adapters"))
    times = interleave(
        {
            "bare": bare,
            "before": forward(backbone, before, prompts),
            "after": forward(backbone, after, prompts),
        },
        plan,
    )
    return {
        "prompts": prompts,
        "milliseconds_per_image": {name: 1000 * float(np.median(values)) / BATCH for name, values in times.items()},
        "before_by_bare": dataclasses.asdict(Ratio.of(times["before"], times["bare"])),
        "after_by_bare": dataclasses.asdict(Ratio.of(times["after"], times["bare"])),
        "after_by_before": dataclasses.asdict(Ratio.of(times["after"], times["before"])),
    }


def table(results: dict[str, Any]) -> list[str]:
    """Two Markdown tables: what closed and what it cost, and what serving gains."""
    lines = [
        "| task | gates closed | still open | fine-tunes | validation accuracy | test accuracy | time of the step |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, found in results.items():
        step = found["closing"]
        left = sorted(set(range(1, step["gates"] + 1)) - set(step["closed"]))
        tuned = sum(tried["epochs"] > 0 for tried in step["tried"])
        val, test = (
            " -> ".join(f"{100 * value:.2f} %" for value in step[name]) if name in step else "-"
            for name in ("val_accuracy", "test_accuracy")
        )
        lines.append(
            f"| {task} | {len(step['closed'])} of {step['gates']} | {', '.join(map(str, left)) or 'none'} | {tuned} "
            f"| {val} | {test} | {step['seconds']:.0f} s |"
        )
    lines += [
        "",
        "| task | prompts | bare, ms per image | before / bare | after / bare | after / before (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    for task, found in results.items():
        for row in found["speed"]:
            ratio = row["after_by_before"]
            lines.append(
                f"| {task} | {row['prompts']} | {row['milliseconds_per_image']['bare']:.2f} "
                f"| {row['before_by_bare']['median']:.3f} | {row['after_by_bare']['median']:.3f} "
                f"| {ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f}) |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds flowers12 and caltech101")
    parser.add_argument("--work", type=Path, default=Path(gettempdir()) / "gpt-serve-closing", help="where copies go")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=20, help="rounds of a timing")
    options = parser.parse_args()
    reuse_freed_memory()  # as every command of gpt-serve does
    steps = {task: close(task, options.data, options.work) for task in options.tasks}
    backbone = Backbone.load(TINY.name)
    plan = Plan(options.repeats)
    results = {
        task: {"closing": step, "speed": [speed(backbone, task, options.work, count, plan) for count in PROMPTS]}
        for task, step in steps.items()
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "table.md").write_text("\n".join(table(results)) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
