"""Batch prediction against `Engine.predict` in a loop, its memory, and a kill in the middle.

::

    python benchmarks/cluster/bulk.py --images FOLDER --task flowers --count 5000
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from gpt_serve import AdapterStore, Backbone, Engine
from gpt_serve.bulk.inputs import open_images
from gpt_serve.bulk.parts import Parts
from gpt_serve.bulk.predict import predict_in_bulk
from gpt_serve.images.convert import SUFFIXES

ROUND = 512  # images of a round of the comparison


def link(folder: Path, images: Path, count: int) -> list[Path]:
    """``count`` of the image files below ``images``, each under a name of its own in ``folder``."""
    found = (path for path in sorted(images.rglob("*")) if path.suffix.lower() in SUFFIXES)
    folder.mkdir()
    for number, path in enumerate(itertools.islice(found, count)):
        (folder / f"{number:06}{path.suffix}").symlink_to(path.resolve())
    return sorted(folder.iterdir())


def loop(engine: Engine, task: str, paths: list[Path]) -> None:
    """What a user would write."""
    for start in range(0, len(paths), engine.max_batch):
        engine.predict([(task, path.read_bytes()) for path in paths[start : start + engine.max_batch]])


def compare(task: str, paths: list[Path], folder: Path, rounds: int) -> list[float]:
    """Throughput of batch prediction by that of the loop, in rounds that take turns on other images each."""
    backbone = Backbone.load("mae-vit-tiny-32")
    engine = Engine(backbone, AdapterStore("adapters/mae-vit-tiny-32"))
    loop(engine, task, paths[:ROUND])  # warm
    ratios = []
    for number in range(rounds):
        part = [paths[(number * ROUND + index) % len(paths)] for index in range(ROUND)]
        place = folder / f"round-{number}"
        place.mkdir()
        for path in part:
            (place / path.name).symlink_to(path.resolve())
        began = time.perf_counter()
        loop(engine, task, part)
        between = time.perf_counter()
        images = open_images(str(place))
        predict_in_bulk(engine, [task], images, Parts(folder / "round.parquet", images, [task]), lambda count: None)
        ratios.append((between - began) / (time.perf_counter() - between))
    return ratios


def kill_and_resume(task: str, images: Path, output: Path) -> dict[str, Any]:
    """The command, killed once half of its parts are there, and run again; its memory in MiB along the way."""
    program = "from gpt_serve.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "predict",
        "--task",
        task,
        "--input",
        str(images),
        "--output",
        str(output),
    ]
    memory: list[float] = []
    half = len(list(images.iterdir())) // 1024 // 2
    process = subprocess.Popen(command)
    while len(list(output.parent.glob(f".{output.name}.parts/part-*.parquet"))) < half:
        memory.append(resident(process.pid))
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lost = not output.exists()
    process = subprocess.Popen(command)
    while process.poll() is None:
        memory.append(resident(process.pid))
        time.sleep(0.2)
    loaded = [value for value in memory if value > 0.5 * max(memory)]
    seen = Counter(pq.read_table(output)["image"].to_pylist())
    return {
        "killed before the output": lost,
        "exit code": process.returncode,
        "images": len(seen),
        "most times that an image is there": max(seen.values()),
        "MiB, first and last tenth": [round(statistics.mean(part)) for part in tenths(loaded)],
        "MiB, most": round(max(memory)),
    }


def tenths(values: list[float]) -> tuple[list[float], list[float]]:
    """The first and the last tenth, the loading of the backbone left out."""
    size = max(1, len(values) // 10)
    return values[size : 2 * size], values[-size:]


def resident(pid: int) -> float:
    """MiB of a process, 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--task", default="flowers")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        paths = link(Path(name) / "images", options.images, options.count)
        ratios = compare(options.task, paths, Path(name), options.rounds)
        print(json.dumps({"throughput by the loop's": [round(ratio, 3) for ratio in ratios],
                          "median": round(statistics.median(ratios), 3)}), flush=True)  # fmt: skip
        print(json.dumps(kill_and_resume(options.task, Path(name) / "images", Path(name) / "results.parquet")))


if __name__ == "__main__":
    main()
