"""One replica, two replicas and ``gpt-serve serve``, in turns: what a second node adds, and what Ray's path costs.

::

    python -m benchmarks.cluster.throughput

The same clients send the same Zipf traffic over 64 tasks to an application with one node of one core, to one with two,
and to a single server with one thread. The clients, Ray's proxy and the front run on the same cores as the replicas.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import httpx

from benchmarks.cluster.setting import Clients, deploy, nodes, zipf
from gpt_serve import AdapterStore, Backbone
from gpt_serve.bench.setting import write_adapters
from gpt_serve.serve.config import ServeConfig

TASKS = 64


@contextmanager
def single(backbone: str, adapters: Path, port: int) -> Iterator[int]:
    """``gpt-serve serve`` with one thread."""
    program = "from gpt_serve.cli.main import main; main()"
    options = ["--backbone", backbone, "--adapters", str(adapters), "--port", str(port), "--engine", "torch"]
    command = [sys.executable, "-c", program, "serve", *options, "--device", "cpu", "--queue-limit", "256"]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 120
            while not ready(port):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("gpt-serve serve did not start")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()


def ready(port: int) -> bool:
    """Whether the server takes requests."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").is_success
    except httpx.TransportError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mae-vit-tiny-32")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        backbone = Backbone.load(options.backbone)
        store = AdapterStore(Path(name) / "adapters", backbone.spec)
        tasks = [adapter.task for adapter in write_adapters(store, backbone, "task", TASKS)]
        config = ServeConfig(adapters=store.root, backbone=options.backbone, engine="torch", queue_limit=256)
        with nodes(3) as port, single(options.backbone, store.root, port + 1):
            deploy(config, 1, "one", "/one")
            deploy(config, 2, "two", "/two")
            places = {"serve": (port + 1, ""), "one replica": (port, "/one"), "two replicas": (port, "/two")}
            measure(places, tasks, options)


def measure(places: dict[str, tuple[int, str]], tasks: list[str], options: argparse.Namespace) -> None:
    """Print requests a second of each place and round, the first round being the warm-up, and their ratios."""
    rates: dict[str, list[float]] = {name: [] for name in places}
    alone: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(options.rounds + 1):
        for name, (port, prefix) in places.items():
            for count, kept in ((options.clients, rates), (1, alone)):
                rate, median = run(port, prefix, tasks, count, options.seconds if count > 1 else options.seconds / 2)
                kept[name].append(rate if count > 1 else 1000 * median)
    for name in places:
        print(json.dumps({"place": name, "requests a second": [round(rate, 1) for rate in rates[name][1:]],
                          "ms alone": [round(value, 1) for value in alone[name][1:]]}), flush=True)  # fmt: skip
    for above, below in (("two replicas", "one replica"), ("one replica", "serve")):
        ratios = [a / b for a, b in zip(rates[above][1:], rates[below][1:], strict=True)]
        print(json.dumps({f"{above} by {below}": [round(ratio, 2) for ratio in ratios],
                          "median": round(statistics.median(ratios), 2)}), flush=True)  # fmt: skip


def run(port: int, prefix: str, tasks: list[str], clients: int, seconds: float) -> tuple[float, float]:
    """Answers a second, and the median of their seconds. Exits when one is not 200."""
    sent = Clients(port, lambda number: zipf(tasks, number), lambda _, status, body: "" if status == 200 else str(body),
                   clients, prefix)  # fmt: skip
    began = time.monotonic()
    with sent:
        time.sleep(seconds)
    if sent.wrong:
        raise SystemExit(f"answers that are not 200: {dict(sent.wrong)}")
    return len(sent.seconds) / (time.monotonic() - began), statistics.median(sent.seconds)


if __name__ == "__main__":
    main()
