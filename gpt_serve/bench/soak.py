"""100,000 requests over 1,000 adapters, a tenth of them resident: the process must not grow."""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from gpt_serve.bench.bank import engine_holding, tasks_at_random
from gpt_serve.bench.setting import Setting, photo, temporary_store, untrained_adapter, write
from gpt_serve.bench.timing import Ratio, Row
from gpt_serve.engine.engine import Engine, Success
from gpt_serve.engine.scheduler import Scheduler
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Preprocess

REQUESTS, WARM_UP, SAMPLES = 100_000, 10_000, 20
ADAPTERS, HELD, PROMPTS, SIDE = 1000, 100, 10, 32
WAITING = 256  # requests on their way at any time
PATIENCE = 600.0  # seconds for an answer
MOST_GROWTH_MB = 30.0  # of resident memory after the warm-up


def bench_soak(setting: Setting, requests: int = REQUESTS, warm_up: int = WARM_UP) -> list[Row]:
    """Send JPEG files through the scheduler to a tiny ViT of random weights, whatever backbone the run has.

    Each tier holds less than the one below: 1,000 files, 200 adapters in host memory, 100 in the bank. Most requests
    load an adapter and evict another. Rows are after each twentieth of the requests, ratios to the first of them.

    Raises:
        AssertionError: the process grew by more than `MOST_GROWTH_MB` after the warm-up.
    """
    backbone = tiny_backbone(str(setting.backbone.device))
    with temporary_store(backbone) as store:
        tasks = [f"task-{index:04}" for index in range(ADAPTERS)]
        for task in tasks:
            write(store, untrained_adapter(backbone, task, prompts=PROMPTS))
        like = untrained_adapter(backbone, "like", prompts=PROMPTS)
        engine = engine_holding(store, backbone, HELD, like, host=2 * HELD)
        scheduler = Scheduler(engine, max_batch=64, batch_timeout=0.005, overlap=backbone.device.type == "cuda")
        images = itertools.cycle([photo(seed, (SIDE, SIDE)) for seed in range(16)])
        stream = zip(tasks_at_random(tasks, 0.0), images, strict=False)
        try:
            answer_all(scheduler, stream, warm_up)
            rows = _sampled(engine, scheduler, stream, requests)
        finally:
            scheduler.close()
    growth = rows[-1].extra["MB grown"]
    assert growth <= MOST_GROWTH_MB, f"{requests} requests left the process {growth:.1f} MB larger"
    return rows


def _sampled(engine: Engine, scheduler: Scheduler, stream: Iterator[tuple[str, bytes]], requests: int) -> list[Row]:
    part, seconds, counts = requests // SAMPLES, [], [_counts(engine)]
    for _ in range(SAMPLES):
        began = time.perf_counter()
        answer_all(scheduler, stream, part)
        seconds.append((time.perf_counter() - began) / part)
        counts.append(_counts(engine))
    rows = []
    for number, (took, count) in enumerate(zip([seconds[0], *seconds], counts, strict=True)):
        ratio = Ratio(*3 * (took / seconds[0],))
        extra = count | {"MB grown": count["MB"] - counts[0]["MB"]}
        rows.append(Row("soak", "tiny ViT", f"after {number * part:,} requests", "scheduler", took, 1, ratio, extra))
    return rows


def _counts(engine: Engine) -> dict[str, float]:
    stats = engine.bank.stats()
    return {"MB": resident_megabytes(), "loads": stats.loads, "disk reads": stats.disk_reads}


def answer_all(scheduler: Scheduler, stream: Iterator[tuple[str, bytes]], requests: int) -> None:
    """Send so many requests, `WAITING` of them at a time; one that fails ends the benchmark."""
    waiting: deque[Future[Success]] = deque()
    for task, image in itertools.islice(stream, requests):
        if len(waiting) >= WAITING:
            waiting.popleft().result()
        waiting.append(scheduler.submit(task, image, time.monotonic() + PATIENCE))
    for future in waiting:
        future.result()


def tiny_backbone(device: str) -> Backbone:
    """Make one of 3 blocks, width 32, 17 tokens and random weights: a pass takes less than the work around it."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocess((SIDE, SIDE), 1.0, "center", "bicubic", half, half)
    return Backbone.from_model(model, "tiny ViT", preprocess, "cls", device=device)


def resident_megabytes() -> float:
    """Return the memory of this process that is in RAM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6
