"""Every method on three tasks with the bundled backbone, at the same number of steps, and ablations.

    python benchmarks/accuracy/study.py --data ../shared/data --jobs 2

Each run is ``gpt-serve train`` in a process of its own. What it printed is kept in ``runs/`` beside this file and not
made again: a study that was stopped goes on. For each method the learning rate is chosen on validation images of one
task, the same number of rates for all; then three seeds on every task, but one for what was only tried on the way to
the default. Test images select nothing. Writes ``tables.md`` and plots, also of a part of the runs (``--report``).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plan import ABLATIONS, BY_NAME, FOLDERS, NMI, SEARCHED_ON, SEEDS, Ablation, Run, Variant, selects_by_loss
from report import write_report

from gpt_serve.model.catalog import TINY

HERE = Path(__file__).parent
RUNS = HERE / "runs"
PHASES = ("search", "methods", "ablations", "nmi")


class Study:
    """Runs and their results.

    Args:
        data: folder that holds flowers12 and caltech101.
        work: for adapters and shares of the images.
        jobs: runs at a time.
    """

    def __init__(self, data: Path, work: Path, jobs: int) -> None:
        self.data, self.work, self.jobs = data, work, jobs

    def result(self, run: Run) -> dict[str, Any] | None:
        """What ``gpt-serve train --json`` printed; None when the run is still to be made.

        Raises:
            SystemExit: it was made by another plan.
        """
        path = RUNS / f"{run.name}.json"
        if not path.exists():
            return None
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recipe = summary["recipe"]
        planned = {"method": run.method, "epochs": run.epochs, "lr": run.lr, "seed": run.seed}
        if changed := [key for key, value in planned.items() if recipe[key] != value]:
            raise SystemExit(f"{path} was made with another {', '.join(changed)} than the plan has: delete it")
        return summary

    def train(self, run: Run) -> None:
        """Make the run unless it is there."""
        path = RUNS / f"{run.name}.json"
        if path.exists():
            return
        RUNS.mkdir(exist_ok=True)
        command = [
            str(Path(sys.executable).with_name("gpt-serve")),
            "train",
            "--json",
            "--backbone",
            TINY.name,
            "--workers",
            "0",
        ]
        command += [
            *run.arguments,
            "--data",
            str(self.images(run)),
            "--adapters",
            str(self.work / "adapters" / run.name),
        ]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{run.name}: {done.stderr.decode()[-500:]}")
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(done.stdout)
        temporary.replace(path)
        metrics = json.loads(done.stdout)["metrics"]
        print(
            f"{run.name}: val {100 * metrics['val_accuracy']:.1f}, test {100 * metrics['test_accuracy']:.1f}",
            flush=True,
        )

    def train_all(self, runs: Iterable[Run]) -> None:
        """Make all runs, ``jobs`` at a time."""
        runs = list(dict.fromkeys(runs))
        for run in runs:
            self.images(run)  # here, since two runs may take the same share
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.train, runs))

    def images(self, run: Run) -> Path | str:
        """The run's image folder; of links to the first images of each class for a share of them."""
        folder = FOLDERS[run.task]
        if folder == "digits":
            return folder
        source = (self.data / folder).resolve()
        if run.share == 1:
            return source
        target = self.work / "shares" / f"{folder}-{run.share:g}"
        for split in ("val", "test"):
            if (source / split).is_dir() and not (target / split).exists():
                target.mkdir(parents=True, exist_ok=True)
                (target / split).symlink_to(source / split)
        for label in sorted((source / "train").iterdir()):
            (target / "train" / label.name).mkdir(parents=True, exist_ok=True)
            images = sorted(label.iterdir())
            for image in images[: round(len(images) * run.share)]:
                if not (target / "train" / label.name / image.name).exists():
                    (target / "train" / label.name / image.name).symlink_to(image)
        return target

    def rate(self, variant: Variant) -> float | None:
        """The learning rate with the best validation score; None while rates are still to be tried."""
        tried = {lr: self.result(Run(variant, SEARCHED_ON, lr, SEEDS[0])) for lr in variant.rates}
        scores = {lr: _validation(summary) for lr, summary in tried.items() if summary is not None}
        return max(scores, key=scores.__getitem__) if len(scores) == len(variant.rates) else None

    def methods(self) -> list[Run]:
        """Every method, task and seed, at the chosen rate."""
        chosen = [(variant, self.rate(variant)) for variant in BY_NAME.values()]
        return [
            Run(variant, task, lr, seed)
            for seed in SEEDS
            for task in FOLDERS
            for variant, lr in chosen
            if lr is not None and task in variant.tasks and seed in variant.seeds
        ]

    def nmi(self) -> dict[str, Run]:
        """Runs by method that record the mutual information between prompts and patch tokens."""
        chosen = {name: self.rate(BY_NAME[name]) for name in NMI}
        return {
            name: Run(BY_NAME[name], SEARCHED_ON, lr, SEEDS[0], ("--nmi",))
            for name, lr in chosen.items()
            if lr is not None
        }

    def ablation(self, ablation: Ablation) -> dict[str, list[Run]]:
        """Runs by what is varied."""
        runs: dict[str, list[Run]] = {}
        for label, (name, more) in ablation.settings.items():
            lr = self.rate(BY_NAME[name])
            if lr is None:
                continue
            for share in ablation.shares or (1.0,):
                shown = f"{label}, {share:.0%}" if ablation.shares else label
                runs[shown] = [
                    Run(BY_NAME[name], task, lr, seed, more, share)
                    for task in ablation.tasks
                    for seed in ablation.seeds
                ]
        return runs


def _validation(summary: dict[str, Any]) -> tuple[float, float]:
    """What a learning rate is chosen by: as its epochs are. Test accuracy plays no part."""
    metrics = summary["metrics"]
    score = metrics["val_accuracy"], -metrics["val_loss"]
    return score[::-1] if selects_by_loss(summary) else score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds flowers12 and caltech101")
    parser.add_argument("--work", type=Path, default=HERE / "scratch", help="for adapters")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", choices=PHASES, action="append", help="a phase; repeat for more")
    parser.add_argument("--report", action="store_true", help="train nothing, write what there is")
    options = parser.parse_args()
    study = Study(options.data, options.work, options.jobs)
    phases = () if options.report else options.only or PHASES
    if "search" in phases:
        study.train_all(Run(variant, SEARCHED_ON, lr, SEEDS[0]) for variant in BY_NAME.values() for lr in variant.rates)
    if "methods" in phases:
        study.train_all(study.methods())
    if "ablations" in phases:
        study.train_all(run for ablation in ABLATIONS for runs in study.ablation(ablation).values() for run in runs)
    if "nmi" in phases:
        study.train_all(study.nmi().values())
    write_report(study, HERE)


if __name__ == "__main__":
    main()
