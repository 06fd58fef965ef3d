"""1,000 adapters in an S3 bucket and two replicas: adapters are published, replaced and removed while clients send.

::

    python -m benchmarks.cluster.churn

The bucket is moto's server on this machine. Every answer must be 200 and equal the reference of the revision that it
names, or 404 for a task that is not in the bucket, or was not within `SETTLED` seconds before. Once the changes have
ended, every answer must name the last revision. Prints JSON.
"""

import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from benchmarks.cluster.setting import Clients, deploy, nodes, zipf
from gpt_serve import AdapterStore, Backbone, Engine
from gpt_serve.adapters.bucket import Bucket
from gpt_serve.adapters.source import FILE_NAME
from gpt_serve.bench.setting import photo, untrained_adapter
from gpt_serve.serve.config import ServeConfig
from tests.s3 import S3

BACKBONE = "mae-vit-tiny-32"
ADDRESS = "s3://models/team"
ADAPTERS = 1000
POLL_SECONDS = 2.0
SETTLED = 1.25 * POLL_SECONDS + 5.0  # until a change is in force: the stated time, and that of listing and fetching
SECONDS = 30.0
IMAGE = photo(0, (128, 96))


@dataclass
class World:
    """What is in the bucket, and what each revision that ever was answers.

    Attributes:
        engine: the reference, on a folder of this machine.
        current: the revision of each task that is there.
        changed: when each task was last changed.
        expected: label and probability of each task and revision.
    """

    engine: Engine
    bucket: Bucket
    s3: S3
    current: dict[str, str] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)
    expected: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)

    def publish(self, tasks: list[str]) -> None:
        """Put a new adapter of each task there, whatever it had."""
        store = self.engine.bank.store
        for task in tasks:
            store.publish(untrained_adapter(self.engine.backbone, task))
        for answer in self.engine.predict([(task, IMAGE) for task in tasks]):
            self.expected[answer.task, answer.revision] = answer.top(1)[0]
            self.changed[answer.task] = time.monotonic()
            self.current[answer.task] = answer.revision
            self.bucket.write(answer.task, {FILE_NAME: (store.root / answer.task / FILE_NAME).read_bytes()})

    def remove(self, task: str) -> None:
        """Take a task away."""
        self.changed[task] = time.monotonic()
        del self.current[task]
        for name in (FILE_NAME, f"{FILE_NAME}.sha256"):
            self.s3.client.delete_object(Bucket="models", Key=f"team/{task}/{name}")

    def check(self, task: str, status: int, body: dict[str, Any]) -> str:
        """See `benchmarks.cluster.setting.Check`."""
        current = self.current.get(task)
        settled = time.monotonic() - self.changed.get(task, 0.0) > SETTLED
        if status == 404:
            return "404 for a task that is there" if settled and current else ""
        if status != 200:
            return f"status {status}: {body.get('detail')}"
        if settled and body["revision"] != current:
            return "an old revision"
        label, probability = self.expected.get((task, body["revision"]), ("", 0.0))
        best = body["predictions"][0]
        same = best["label"] == label and abs(best["probability"] - probability) < 1e-5
        return "" if same else "not what the revision answers"


def change(world: World, seconds: float) -> dict[str, int]:
    """Publish, replace and remove tasks in turn; how many of each."""
    counts = dict.fromkeys(("published", "replaced", "removed"), 0)
    drawn, end = random.Random(1), time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() > end:
            return counts
        kind = list(counts)[number % 3]
        counts[kind] += 1
        if kind == "removed":
            world.remove(drawn.choice(list(world.current)))
        else:
            world.publish([f"new-{number}" if kind == "published" else drawn.choice(list(world.current)[:100])])
        time.sleep(0.1)
    raise AssertionError


def main() -> None:
    with TemporaryDirectory() as name:
        s3 = S3()
        os.environ |= {**s3.env, "XDG_CACHE_HOME": name}  # nodes that are started inherit it
        s3.client.create_bucket(Bucket="models")
        backbone = Backbone.load(BACKBONE)
        engine = Engine(backbone, AdapterStore(Path(name) / "reference", backbone.spec))
        world = World(engine, Bucket(ADDRESS), s3)
        world.publish([f"task-{number}" for number in range(ADAPTERS)])
        config = ServeConfig(
            adapters=ADDRESS, backbone=BACKBONE, engine="torch", poll_seconds=POLL_SECONDS, deadline=120
        )

        def tasks(number: int) -> Iterator[str]:
            """Of the bucket and, in turn with them, one of the newest, which mostly is not in force yet."""
            for task in zipf([f"task-{index}" for index in range(ADAPTERS)], number, 0.8):
                yield task
                yield list(world.current)[-1 - number % 3]

        with nodes(2) as port:
            deploy(config, 2)
            s3.calls.clear()
            began = time.monotonic()
            with Clients(port, tasks, world.check, image=IMAGE) as clients:
                counts = change(world, SECONDS)
                time.sleep(SETTLED + 3)
            seconds = time.monotonic() - began
            listings, fetches = s3.listings, s3.count("GET", FILE_NAME)
        s3.stop()
        print(json.dumps(counts | {"answers": clients.statuses, "wrong": clients.wrong, "seconds": round(seconds, 1),
                                   "listing calls": listings, "calls a listing": -(-2 * len(world.current) // 1000),
                                   "fetches": fetches}))  # fmt: skip


if __name__ == "__main__":
    main()
