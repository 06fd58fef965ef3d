"""Scaling from 1 to 3 replicas and back, and a rolling update of the backbone, while 16 clients send.

::

    python -m benchmarks.cluster.changes

Every answer must be 200 and equal the reference to 1e-5. Prints a line of JSON for each step.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from safetensors.torch import save_file

from benchmarks.cluster.setting import Clients, deploy, nodes, zipf
from gpt_serve import AdapterStore, Backbone, Engine
from gpt_serve.bench.setting import photo, write_adapters
from gpt_serve.serve.config import ServeConfig

BACKBONE = "mae-vit-tiny-32"
TASKS = 64


def main() -> None:
    with TemporaryDirectory() as name:
        backbone = Backbone.load(BACKBONE)
        store = AdapterStore(Path(name) / "adapters", backbone.spec)
        tasks = [adapter.task for adapter in write_adapters(store, backbone, "task", TASKS)]
        answers = Engine(backbone, store).predict([(task, photo(0)) for task in tasks])
        expected = {answer.task: (answer.revision, answer.top(1)[0]) for answer in answers}

        def check(task: str, status: int, body: dict[str, Any]) -> str:
            if status != 200:
                return f"status {status}: {body.get('detail')}"
            revision, (label, probability) = expected[task]
            best = body["predictions"][0]
            same = best["label"] == label and abs(best["probability"] - probability) < 1e-5
            return "" if same and body["revision"] == revision and body["task"] == task else "another answer"

        weights = Path(name) / "weights.safetensors"
        save_file(backbone.timm_model.state_dict(), weights)
        config = ServeConfig(
            adapters=store.root, backbone=BACKBONE, engine="torch", max_batch_size=8, deadline=120, queue_limit=256
        )
        updated = replace(config, checkpoint=weights)
        steps = [("1 to 3 replicas", config, 3), ("update of 3 replicas", updated, 3), ("3 to 1 replicas", updated, 1)]
        with nodes(3) as port:
            deploy(config, 1)
            with Clients(port, lambda number: zipf(tasks, number), check) as clients:
                time.sleep(2)
                for step, settings, replicas in steps:
                    before = clients.statuses.copy()
                    seconds = deploy(settings, replicas)
                    time.sleep(2)
                    line = {"step": step, "seconds": round(seconds, 1), "answers": dict(clients.statuses - before)}
                    print(json.dumps(line | {"wrong": clients.wrong}), flush=True)
        longest = round(max(clients.seconds), 2)
        print(json.dumps({"all answers": clients.statuses, "wrong": clients.wrong, "longest wait": longest}))


if __name__ == "__main__":
    main()
