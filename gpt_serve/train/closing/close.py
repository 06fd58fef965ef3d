"""Gates that close: from a published adapter to one with fewer open gates."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt_serve.adapters.adapter import Adapter, closed_gates
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import DataError, UsageError
from gpt_serve.insight.inspect import inspect_adapter
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.card import card_text
from gpt_serve.train.checkpoint import held, run_folder
from gpt_serve.train.closing.search import GateSearch
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.fit import load_views, make_deterministic
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Reporter, TrainingJob, Views
from gpt_serve.train.loop import predict_all
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.publishing import publish, utc_now
from gpt_serve.train.recipes.recipe import Recipe

LEAST_EPOCHS = 5  # of a fine-tune: fewer do not settle


@dataclass(frozen=True)
class ClosingJob:
    """Whose gates to close and what that may cost.

    Attributes:
        task: name of a published task.
        data: the image folder or data set that it was trained on.
        adapters: folder of the adapter store.
        tolerance: percentage points of validation accuracy that may be lost.
        epochs: of each fine-tune; None for a quarter of training's, at least 5.
        lr: peak learning rate of each fine-tune; None for a quarter of training's.
        skip_unreadable: go on without the images that cannot be read.
        workers: processes that decode when the images exceed the cache.
    """

    task: str
    data: str
    adapters: Path
    tolerance: float = 0.0
    epochs: int | None = None
    lr: float | None = None
    skip_unreadable: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 100:
            raise UsageError(f"--tolerance must lie between 0 and 100 percentage points, not {self.tolerance}")


def close_gates(backbone: Backbone, job: ClosingJob, reporter: Reporter) -> dict[str, Any]:
    """Close as many gates of a published adapter as validation accuracy allows, and publish what comes out.

    Fine-tuning draws its images from the split that training used, by the record in the adapter. When no gate can
    close, or the run is interrupted, the published adapter stays as it is.

    Returns:
        ``task``, ``revision``, ``metrics`` of what is published now, and ``closing``: the record of this step, as in
        the adapter's ``training``; its ``closed`` is empty when no gate could close.

    Raises:
        GPTServeError: the adapter cannot be used or has no gate to close, the data is not what it was trained on, or
            another process trains the task.
    """
    with held(run_folder(job.adapters, job.task)):
        return _close_in_folder(backbone, job, reporter)


def _close_in_folder(backbone: Backbone, job: ClosingJob, reporter: Reporter) -> dict[str, Any]:
    started = time.perf_counter()
    store = AdapterStore(job.adapters, backbone.spec)
    stored = store.load(job.task)
    recipe, sha256 = _check(stored.adapter, job)
    make_deterministic(backbone)
    work = TrainingJob(
        job.task, job.data, job.adapters, recipe, skip_unreadable=job.skip_unreadable, workers=job.workers
    )
    views = load_views(open_dataset(job.data, recipe.seed), stored.adapter.preprocess, work, reporter)
    if views.digest != sha256:
        raise DataError(f"--data {job.data} is not what {job.task!r} was trained on: use the same images and split")
    search = GateSearch(backbone, stored.adapter, work, views, reporter)
    kept = search.run(job.tolerance)
    step = search.record(kept, job.tolerance) | {"seconds": round(time.perf_counter() - started, 1)}
    revision, adapter = stored.revision, stored.adapter
    if kept is not None:
        accuracies, answers = _on_unseen(backbone, stored.adapter, kept.adapter, views, job.workers)
        if views.test is not None:
            step["test_accuracy"] = accuracies
        adapter = _with_step(kept.adapter, step)
        if store.signature(job.task) != stored.signature:
            raise UsageError(f"adapter {job.task!r} was replaced while its gates were closed: repeat the command")
        revision = publish(job.adapters, adapter, answers, views.unseen[1])
    return {"task": job.task, "revision": revision, "metrics": adapter.training["metrics"], "closing": step}


def _on_unseen(
    backbone: Backbone, before: Adapter, after: Adapter, views: Views, workers: int
) -> tuple[list[float], tuple[Tensor, Tensor]]:
    """Accuracies of both adapters on test images, validation images when there are none, and ``after``'s answers.

    Nothing is selected by them.
    """
    view, _ = views.unseen
    correct = []
    for adapter in (before, after):
        module = AdapterModule.of(adapter, backbone.spec, 0.0).to(backbone.device)
        predictions, targets = predict_all(backbone, module, view, Inputs(workers))
        correct.append((predictions == targets).double().mean().item())
    return correct, (predictions, targets)


def _with_step(adapter: Adapter, step: dict[str, Any]) -> Adapter:
    """``adapter`` with metrics of its present tensors, and one closing step more in its record."""
    after = {name: step[name][1] for name in ("val_accuracy", "val_loss", "test_accuracy") if name in step}
    training = adapter.training | {
        "metrics": adapter.training["metrics"] | after,
        "closing": [*adapter.training.get("closing", []), step],
    }
    return replace(adapter, training=training, created=utc_now())


def _check(adapter: Adapter, job: ClosingJob) -> tuple[Recipe, str]:
    """How to fine-tune, and the digest of the images that the adapter was trained on.

    Raises:
        UsageError: the adapter has no open gates, or no record of its training.
    """
    if adapter.gamma is None:
        raise UsageError(f"adapter {job.task!r} learns no gates (method {adapter.method}): there is nothing to close")
    if closed_gates(adapter.gamma).all():
        raise UsageError(f"all gates of adapter {job.task!r} are closed already")
    try:
        recipe = Recipe(**adapter.training["recipe"])
        sha256 = adapter.training["data"]["sha256"]
        card_text(adapter, "", inspect_adapter(adapter), "test")  # the new card needs all that the old one did
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise UsageError(
            f"adapter {job.task!r} does not tell how it was trained: train it with gpt-serve train"
        ) from error
    if recipe.final_fit:
        raise UsageError(
            f"{job.task!r} was trained on the validation images, which decide: train it with --no-final-fit"
        )
    epochs = max(LEAST_EPOCHS, math.ceil(recipe.epochs / 4)) if job.epochs is None else job.epochs
    lr = recipe.lr / 4 if job.lr is None else job.lr
    # The tolerance is of accuracy, so that is what an epoch must be good in, whatever it was while training.
    return replace(recipe, epochs=epochs, warmup=0, lr=lr, min_lr=min(recipe.min_lr, lr), select="accuracy"), sha256
