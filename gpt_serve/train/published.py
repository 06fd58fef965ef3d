"""A published adapter beside the images that it was trained on, for those who go on with it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore, StoredAdapter
from gpt_serve.errors import DataError, UsageError
from gpt_serve.insight.inspect import inspect_adapter
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.card import card_text
from gpt_serve.train.checkpoint import held, run_folder
from gpt_serve.train.conclusion import Conclusion, conclude
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.fit import load_views, make_deterministic
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Reporter, TrainingJob, Views
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.publishing import publish, utc_now
from gpt_serve.train.recipes.recipe import Recipe


@dataclass(frozen=True)
class PublishedJob:
    """Which published adapter to go on with.

    Attributes:
        task: name of a published task.
        data: the image folder or data set that it was trained on.
        adapters: folder of the adapter store.
        skip_unreadable: go on without the images that cannot be read.
        workers: processes that decode when the images exceed the cache.
    """

    task: str
    data: str
    adapters: Path
    skip_unreadable: bool = False
    workers: int = 2

    def training(self, recipe: Recipe) -> TrainingJob:
        """The job of training this adapter by ``recipe``."""
        return TrainingJob(
            self.task, self.data, self.adapters, recipe, skip_unreadable=self.skip_unreadable, workers=self.workers
        )


def calibrate_published(backbone: Backbone, job: PublishedJob, reporter: Reporter) -> dict[str, Any]:
    """Calibrate a published adapter anew, as training does at its end, and publish what comes out.

    Returns:
        ``task``, ``revision``, ``metrics`` and ``calibration`` of what is published now.

    Raises:
        GPTServeError: the adapter cannot be used or does not tell how it was trained, the data is not what it was
            trained on, or another process trains the task.
    """
    with held(run_folder(job.adapters, job.task)):
        store = AdapterStore(job.adapters, backbone.spec)
        stored = store.load(job.task)
        adapter, views = stored.adapter, images_of(backbone, stored.adapter, job, recipe_of(stored.adapter), reporter)
        calibrated, end = concluded(backbone, adapter, views, job.workers, reporter)
        check_still(store, stored, "it was calibrated")
        revision = publish(job.adapters, replace(calibrated, created=utc_now()), end)
    training = calibrated.training
    return {"task": job.task, "revision": revision} | {key: training[key] for key in ("metrics", "calibration")}


def concluded(
    backbone: Backbone, adapter: Adapter, views: Views, workers: int, reporter: Reporter
) -> tuple[Adapter, Conclusion]:
    """``adapter`` as training would leave it at its end: calibrated, and with what tells strangers.

    The temperature that it was calibrated with before is undone.
    """
    module = module_of(backbone, adapter)
    known = adapter.training.get("calibration", {"temperature": 1.0})["temperature"]
    end = conclude(backbone, module, views, Inputs(workers), reporter, known=known)
    training = adapter.training | {"calibration": end.calibration}
    return replace(adapter, training=training, **module.stored()), end


def module_of(backbone: Backbone, adapter: Adapter) -> AdapterModule:
    """The adapter as a module on the backbone's device, without dropout."""
    return AdapterModule.of(adapter, backbone.spec, 0.0).to(backbone.device)


def recipe_of(adapter: Adapter) -> Recipe:
    """How the adapter was trained.

    Raises:
        UsageError: it does not tell, validation images were trained on, or it is for segmentation.
    """
    if adapter.kind != "classification":
        raise UsageError(f"adapter {adapter.task!r} answers with masks: this is for classification")
    try:
        recipe = Recipe(**adapter.training["recipe"])
        card_text(adapter, "", inspect_adapter(adapter), "test")  # the new card needs all that the old one did
        adapter.training["data"]["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise UsageError(
            f"adapter {adapter.task!r} does not tell how it was trained: train it with gpt-serve train"
        ) from error
    if recipe.final_fit or recipe.refit:
        flag = "--no-final-fit" if recipe.final_fit else "--no-refit"
        raise UsageError(f"{adapter.task!r} was fitted to the validation images, which decide: train it with {flag}")
    return recipe


def images_of(backbone: Backbone, adapter: Adapter, job: PublishedJob, recipe: Recipe, reporter: Reporter) -> Views:
    """The images that the adapter was trained on, split as they were.

    Raises:
        DataError: ``job.data`` holds others.
    """
    make_deterministic(backbone)
    dataset = open_dataset(job.data, recipe.seed)
    views = load_views(dataset, adapter.preprocess, job.training(recipe), reporter)
    if views.digest != adapter.training["data"]["sha256"]:
        raise DataError(f"--data {job.data} is not what {job.task!r} was trained on: use the same images and split")
    return views


def check_still(store: AdapterStore, stored: StoredAdapter, what: str) -> None:
    """Raise `UsageError` if the adapter was replaced since it was loaded; ``what`` says what was done meanwhile."""
    task = stored.adapter.task
    if store.signature(task) != stored.signature:
        raise UsageError(f"adapter {task!r} was replaced while {what}: repeat the command")
