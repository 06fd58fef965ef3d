"""Gates that close: from a published adapter to one with fewer open gates."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from gpt_serve.adapters.adapter import Adapter, closed_gates
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.answers import predict_all
from gpt_serve.train.checkpoint import held, run_folder
from gpt_serve.train.closing.search import GateSearch
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Reporter
from gpt_serve.train.published import PublishedJob, check_still, concluded, images_of, module_of, recipe_of
from gpt_serve.train.publishing import publish, utc_now
from gpt_serve.train.recipes.recipe import Recipe

LEAST_EPOCHS = 5  # of a fine-tune: fewer do not settle


@dataclass(frozen=True, kw_only=True)
class ClosingJob(PublishedJob):
    """Whose gates to close and what that may cost.

    Attributes:
        tolerance: percentage points of validation accuracy that may be lost.
        epochs: of each fine-tune; None for a quarter of training's, at least 5.
        lr: peak learning rate of each fine-tune; None for a quarter of training's.
    """

    tolerance: float = 0.0
    epochs: int | None = None
    lr: float | None = None

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
    recipe = _fine_tune(stored.adapter, job)
    views = images_of(backbone, stored.adapter, job, recipe, reporter)
    search = GateSearch(backbone, stored.adapter, job.training(recipe), views, reporter)
    kept = search.run(job.tolerance)
    step = search.record(kept, job.tolerance) | {"seconds": round(time.perf_counter() - started, 1)}
    revision, adapter = stored.revision, stored.adapter
    if kept is not None:
        before = predict_all(backbone, module_of(backbone, stored.adapter), views.unseen[0], Inputs(job.workers))
        adapter, end = concluded(backbone, _uncalibrated(kept.adapter), views, job.workers, reporter)
        if views.test is not None:
            step["test_accuracy"] = [before.accuracy, end.answers.accuracy]
        adapter = _with_step(adapter, step)
        check_still(store, stored, "its gates were closed")
        revision = publish(job.adapters, adapter, end)
    return {"task": job.task, "revision": revision, "metrics": adapter.training["metrics"], "closing": step}


def _uncalibrated(adapter: Adapter) -> Adapter:
    """``adapter`` without the record of a calibration that its present head, fine-tuned since, does not have."""
    return replace(adapter, training={key: item for key, item in adapter.training.items() if key != "calibration"})


def _with_step(adapter: Adapter, step: dict[str, Any]) -> Adapter:
    """``adapter`` with metrics of its present tensors, and one closing step more in its record."""
    after = {name: step[name][1] for name in ("val_accuracy", "val_loss", "test_accuracy") if name in step}
    training = adapter.training | {
        "metrics": adapter.training["metrics"] | after,
        "closing": [*adapter.training.get("closing", []), step],
    }
    return replace(adapter, training=training, created=utc_now())


def _fine_tune(adapter: Adapter, job: ClosingJob) -> Recipe:
    """How to fine-tune.

    Raises:
        UsageError: the adapter has no open gates, or no record of its training.
    """
    if adapter.gamma is None:
        raise UsageError(f"adapter {job.task!r} learns no gates (method {adapter.method}): there is nothing to close")
    if closed_gates(adapter.gamma).all():
        raise UsageError(f"all gates of adapter {job.task!r} are closed already")
    recipe = recipe_of(adapter)
    epochs = max(LEAST_EPOCHS, math.ceil(recipe.epochs / 4)) if job.epochs is None else job.epochs
    lr = recipe.lr / 4 if job.lr is None else job.lr
    # The tolerance is of accuracy, so that is what an epoch must be good in, whatever it was while training.
    return replace(recipe, epochs=epochs, warmup=0, lr=lr, min_lr=min(recipe.min_lr, lr), select="accuracy")
