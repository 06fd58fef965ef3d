"""Adapters come, change and go while clients send: every answer is that of the revision it names."""

import io
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.scheduler import Scheduler
from gpt_serve.engine.slab import Packed
from gpt_serve.errors import UnknownTask
from gpt_serve.model.backbone import Backbone
from tests import reference
from tests.factories import make_adapter, remove_adapter
from tests.tiny_vit import SIDE

CLIENTS = 8
SECONDS, MOST_SECONDS = 1.5, 60  # on a busy machine it takes longer to see enough
KINDS = ("gated", "gated-hard", "vpt-deep", "vpt-shallow", "linear")
TASKS = [f"task-{number}" for number in range(10)]
ROOM = 3  # adapters in the bank: most requests find theirs elsewhere, and every slot is used again and again


def pictures() -> dict[bytes, Tensor]:
    """PNG files of the input size and their pixels."""
    files = {}
    for seed in range(3):
        pixels = torch.randint(
            0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        files[file.getvalue()] = pixels
    return files


def expected(backbone: Backbone, adapter: Adapter, pixels: Tensor) -> Tensor:
    """The class probabilities by the slow reference."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (adapter.preprocess.mean, adapter.preprocess.std))
    result = reference.forward(
        backbone.model,
        (pixels.float() / 255 - mean) / std,
        pool=adapter.pool,
        head_weight=adapter.head_weight,
        head_bias=adapter.head_bias,
        prompt=adapter.prompt,
        gamma=adapter.gamma,
        tau=adapter.tau,
    )
    return result.logits.softmax(dim=0)


class Publisher(threading.Thread):
    """Replaces a task every few milliseconds; the second half of the tasks are removed at times, too."""

    def __init__(self, backbone: Backbone, store: AdapterStore) -> None:
        super().__init__()
        self.backbone, self.store = backbone, store
        self.stopped = threading.Event()
        self.published: dict[str, Adapter] = {}  # by revision
        self.random = random.Random(0)
        for task in TASKS:
            self.publish(task)

    def publish(self, task: str) -> None:
        seed = len(self.published)
        adapter = make_adapter(self.backbone.spec, task, method=KINDS[seed % len(KINDS)], classes=4, seed=seed)
        self.published[self.store.publish(adapter)] = adapter

    def run(self) -> None:
        while not self.stopped.wait(0.01):
            task = self.random.choice(TASKS)
            if task in TASKS[5:] and task in self.store.tasks() and self.random.random() < 0.5:
                remove_adapter(self.store, task)
            else:
                self.publish(task)


def enough(engine: Engine, answers: list[tuple[str, bytes, Prediction | BaseException]]) -> bool:
    """Whether every slot was used again and again, and many revisions answered."""
    revisions = {answer.revision for *_, answer in list(answers) if isinstance(answer, Prediction)}
    return engine.bank.stats().evictions > 20 and len(revisions) > 20 and len(answers) > 200


@pytest.mark.parametrize("overlap", [True, False])
def test_every_answer_is_of_the_revision_it_names(tiny: Backbone, tmp_path: Path, overlap: bool) -> None:
    store = AdapterStore(tmp_path, tiny.spec)
    publisher = Publisher(tiny, store)
    largest = max(Packed.of(adapter, tiny.spec).extent(0) for adapter in publisher.published.values())
    engine = Engine(tiny, store, bank_bytes=(ROOM * largest + 1) * tiny.spec.width * 4, host_bytes=100_000)
    scheduler = Scheduler(engine, max_batch=16, batch_timeout=0.001, overlap=overlap)
    files = pictures()
    answers: list[tuple[str, bytes, Prediction | BaseException]] = []

    def send(seed: int) -> None:
        """Three requests at a time."""
        choose = random.Random(seed)
        while not publisher.stopped.is_set():
            requests = [(choose.choice(TASKS), choose.choice(list(files))) for _ in range(3)]
            futures = [scheduler.submit(*request, time.monotonic() + 60) for request in requests]
            for request, future in zip(requests, futures, strict=True):
                error = future.exception(timeout=60)
                answers.append((*request, error or future.result()))

    clients = [threading.Thread(target=send, args=(seed,)) for seed in range(CLIENTS)]
    for thread in (publisher, *clients):
        thread.start()
    time.sleep(SECONDS)
    end = time.monotonic() + MOST_SECONDS
    while not enough(engine, answers) and time.monotonic() < end:
        time.sleep(0.05)
    publisher.stopped.set()
    for thread in (publisher, *clients):
        thread.join()
    scheduler.close()

    known: dict[tuple[str, bytes], Tensor] = {}
    for task, file, answer in answers:
        if isinstance(answer, UnknownTask):
            assert task in TASKS[5:]
            continue
        assert isinstance(answer, Prediction), answer
        adapter = publisher.published[answer.revision]
        assert (answer.task, answer.labels, adapter.task) == (task, adapter.labels, task)
        if (answer.revision, file) not in known:
            known[answer.revision, file] = expected(tiny, adapter, files[file])
        torch.testing.assert_close(answer.probabilities, known[answer.revision, file], rtol=1e-4, atol=1e-5)
    assert enough(engine, answers)
    assert not engine.bank._pins, "a pin was not given back"
