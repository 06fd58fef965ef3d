"""Gated prompts at the default rate against a linear probe whose rate is chosen on validation: three seeds each.

    python benchmarks/accuracy/study.py --data ../shared/data --jobs 2

Each run is ``gpt-serve train`` in a process of its own. Finished runs are kept in ``runs/`` below ``--work`` and not
repeated. Writes ``results.json`` and ``table.md`` beside this file.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).parent
TASKS = {"flowers": "flowers12", "caltech101": "caltech101"}
RATES = {"gated": (0.01,), "linear": (0.005, 0.015, 0.05)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-lr{self.lr:g}-seed{self.seed}"


def train(run: Run, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """The summary that ``gpt-serve train --json`` prints, from ``work`` when the run is already there."""
    result = work / "runs" / f"{run.name}.json"
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).with_name("gpt-serve")), "train", "--json", "--task", run.task]
        command += ["--data", str(data / TASKS[run.task]), "--method", run.method]
        command += ["--lr", str(run.lr), "--seed", str(run.seed), "--adapters", str(work / "adapters" / run.name)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
        result.write_bytes(output)
        print(run.name, "done", flush=True)
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds flowers12 and caltech101")
    parser.add_argument("--work", type=Path, default=HERE / "scratch", help="where runs and adapters are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def train_all(runs: list[Run]) -> dict[Run, dict[str, Any]]:
        with ThreadPoolExecutor(options.jobs) as pool:
            return dict(
                zip(runs, pool.map(lambda run: train(run, options.data, options.work, threads), runs), strict=True)
            )

    first = train_all([Run(t, m, lr, SEEDS[0]) for m in RATES for t in TASKS for lr in RATES[m]])
    chosen = {}
    for task in TASKS:
        for method in RATES:
            candidates = [run for run in first if (run.task, run.method) == (task, method)]
            chosen[task, method] = max(candidates, key=lambda run: validation(first[run])).lr
    runs = train_all([Run(t, m, chosen[t, m], seed) for m in RATES for t in TASKS for seed in SEEDS])
    report(runs, first, chosen)


def validation(summary: dict[str, Any]) -> tuple[float, float]:
    """What a learning rate is chosen by: validation accuracy, then validation loss. Test accuracy plays no part."""
    metrics = summary["metrics"]
    return metrics["val_accuracy"], -metrics["val_loss"]


def report(
    runs: dict[Run, dict[str, Any]], first: dict[Run, dict[str, Any]], chosen: dict[tuple[str, str], float]
) -> None:
    """Write the numbers and the table."""

    def accuracies(method: str, task: str) -> list[float]:
        picked = [runs[run] for run in runs if (run.method, run.task) == (method, task)]
        return [100 * summary["metrics"]["test_accuracy"] for summary in picked]

    lines = ["| method | flowers | caltech101 | mean of both | trainable parameters |", "|---|---|---|---|---|"]
    rows = {}
    for method in RATES:
        by_task = {task: accuracies(method, task) for task in TASKS}
        means = [mean(values) for values in zip(*by_task.values(), strict=True)]
        rows[method] = {"by_seed": by_task, "mean_by_seed": means}
        parameters = [runs[Run(task, method, chosen[task, method], SEEDS[0])]["trainable_parameters"] for task in TASKS]
        cells = [
            f"{mean(values):.1f} ± {stdev(values):.1f} (lr {chosen[task, method]:g})"
            for task, values in by_task.items()
        ]
        cells += [f"**{mean(means):.1f} ± {stdev(means):.1f}**", " / ".join(f"{count:,}" for count in parameters)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    searched = {run.name: summary["metrics"] for run, summary in (first | runs).items()}
    content = {"methods": rows, "chosen_lr": {f"{t}-{m}": lr for (t, m), lr in chosen.items()}, "runs": searched}
    (HERE / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
