"""All attacks at once, with adapters that come, change and go: ``python -m benchmarks.attacks.together --minutes 10``.

Honest clients check every answer: it must come, name a revision that was published, and be what that revision says.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import click

from benchmarks.attacks.attacks import ATTACKS
from benchmarks.attacks.honest import attacked, port_of, serving
from gpt_serve.adapters.adapter import revision_of
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.setting import photo, untrained_adapter
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import TINY

CHANGING = ("churn-0", "churn-1", "churn-2")
HONEST = 4  # clients
FEWER = 8  # an attack has this part of the clients that it has alone
CLOSE = 1e-4  # between probabilities of the same image and revision, in whatever batch


@dataclass
class Ledger:
    """What was published, and what was answered.

    Attributes:
        revisions: of each changing task, every one that was ever there.
        first: what each task and revision said of each image the first time.
        statuses: of all honest requests; 0 for those that got no answer at all.
        reasons: what refusals said.
        wrong: answers that no published revision gives.
    """

    revisions: dict[str, set[str]] = field(default_factory=lambda: {task: set() for task in CHANGING})
    first: dict[tuple[str, str, int], dict[str, float]] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, task: str, image: int, content: dict[str, Any]) -> None:
        """Compare an answer with what was said before."""
        given = {item["label"]: item["probability"] for item in content["predictions"]}
        known = self.first.setdefault((task, content["revision"], image), given)
        if content["task"] != task or content["revision"] not in self.revisions[task]:
            self.wrong.append(f"{task}: {content['task']} {content['revision']}")
        if any(abs(known.get(label, probability) - probability) > CLOSE for label, probability in given.items()):
            self.wrong.append(f"{task} {content['revision']}: {given} instead of {known}")


@click.command()
@click.option("--minutes", type=click.FloatRange(0.1, 60), default=10.0, show_default=True)
@click.option("--http-workers", type=click.IntRange(1, 8), default=2, show_default=True, help="Of the server.")
def main(minutes: float, http_workers: int) -> None:
    """Print memory as it goes, and in the end what became of all honest requests; exit code 1 if any went wrong."""
    ledger, stop = Ledger(), threading.Event()
    with serving("--http-workers", str(http_workers), dear_prompts=64) as server:
        port = port_of(server)
        changes = Changes(Path(server.adapters), ledger)  # type: ignore[attr-defined]
        helpers = [threading.Thread(target=changes.run, args=(stop,))]
        helpers += [threading.Thread(target=honest, args=(port, seed, ledger, stop)) for seed in range(HONEST)]
        ended = multiprocessing.Event()
        attackers = multiprocessing.Process(target=attack_all, args=(port, ended), daemon=True)
        for helper in helpers:
            helper.start()
        attackers.start()
        memory = watch(server.pid, minutes * 60)
        ended.set()
        stop.set()
        for helper in helpers:
            helper.join()
        attackers.join(90)
        attackers.kill()
        slots = settled(port)
        server.send_signal(signal.SIGTERM)
        code = server.wait(90)
    counts = {"statuses": dict(ledger.statuses), "reasons": dict(ledger.reasons.most_common(5))}
    print(json.dumps(counts | {"wrong": ledger.wrong[:5], "slots left": slots, "exit": code}))
    early = memory[len(memory) // 4]
    print(f"memory: {early:.0f} MB after a quarter, {memory[-1]:.0f} MB in the end, {max(memory):.0f} MB at most")
    sys.exit(1 if ledger.wrong or ledger.statuses[0] or ledger.statuses[500] or slots or code else 0)


class Changes:
    """Publishes adapters for the changing tasks: three revisions of each, in turns, one every half a second."""

    def __init__(self, root: Path, ledger: Ledger) -> None:
        backbone = Backbone.load(TINY.name)
        self.store, self.ledger = AdapterStore(root, backbone.spec), ledger
        adapters = [untrained_adapter(backbone, task, prompts=4 + number) for number in range(3) for task in CHANGING]
        self.adapters = itertools.cycle(adapters)
        for _ in CHANGING:
            self.publish()

    def publish(self) -> None:
        """The next one."""
        adapter = next(self.adapters)
        self.ledger.revisions[adapter.task].add(revision_of(adapter.to_bytes()))
        self.store.publish(adapter)

    def run(self, stop: threading.Event) -> None:
        """Until told to stop."""
        while not stop.wait(0.5):
            self.publish()


def honest(port: int, seed: int, ledger: Ledger, stop: threading.Event) -> None:
    """Ask one changing task after another about images of its own."""
    chance = random.Random(seed)
    images = [photo(10 * seed + number) for number in range(3)]
    while not stop.is_set():
        task, number = chance.choice(CHANGING), chance.randrange(len(images))
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/predict/{task}", images[number], {"Content-Type": "image/jpeg"}
        )
        try:
            with urllib.request.urlopen(request, timeout=90) as response:
                ledger.check(task, 10 * seed + number, json.load(response))
                ledger.statuses[200] += 1
        except urllib.error.HTTPError as error:
            ledger.statuses[error.code] += 1
            ledger.reasons[json.load(error).get("detail", "")[:60]] += 1
            error.close()
        except OSError:
            ledger.statuses[0] += 1
        stop.wait(0.05)


def attack_all(port: int, ended: Event) -> None:
    """All attacks, each with a part of its clients."""
    stops = [attacked(port, attack, max(1, threads // FEWER)) for attack, threads in ATTACKS.values()]
    ended.wait(3600)
    for stop in stops:
        stop.set()


def watch(pid: int, seconds: float) -> list[float]:
    """Megabytes of the server's processes together, a sample every five seconds."""
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(5)
        samples.append(sum(megabytes(process) for process in family(pid)))
        if len(samples) % 12 == 0:
            print(f"{5 * len(samples)} s: {samples[-1]:.0f} MB", flush=True)
    return samples


def family(pid: int) -> list[int]:
    """A process and those that it started."""
    lists = [(task / "children").read_text(encoding="utf-8").split() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [pid, *(int(child) for children in lists for child in children)]


def megabytes(pid: int) -> float:
    """Of memory that is a process's own."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has just ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def settled(port: int) -> int:
    """How many slots are still taken when nobody asks any more."""
    for _ in range(60):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        taken = int(float(next(line.split()[1] for line in lines if line.startswith("gpt_serve_in_flight "))))
        if not taken:
            return 0
        time.sleep(1)
    return taken


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
