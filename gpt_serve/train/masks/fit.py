"""From pictures with label files to a published segmentation adapter."""

import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Preprocess
from gpt_serve.train.checkpoint import RunCheckpoint
from gpt_serve.train.data.samples import digest
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import begun, initial_settings, run_identity
from gpt_serve.train.inputs import Inputs, TrunkInputs
from gpt_serve.train.job import Reporter, TrainingJob
from gpt_serve.train.loop import EpochRecord, Progress
from gpt_serve.train.masks.card import Example, write_mask_card
from gpt_serve.train.masks.loop import MaskTrainer, measure
from gpt_serve.train.masks.modules import CHANNELS, MaskModule, SetrModule
from gpt_serve.train.masks.recipe import MaskRecipe, covered, mask_taps
from gpt_serve.train.masks.samples import Ids, MaskDataset
from gpt_serve.train.masks.scan import Scanned, count_lines, scan_masks
from gpt_serve.train.masks.score import Confusion
from gpt_serve.train.masks.sources import open_masks
from gpt_serve.train.masks.start import start_masks
from gpt_serve.train.masks.views import MaskView, Pictures
from gpt_serve.train.methods.heads import make_head
from gpt_serve.train.publishing import rehearse, to_adapter
from gpt_serve.train.recipes.recipe import Augment

EXAMPLES = 3  # pictures that the card shows


@dataclass(frozen=True)
class MaskViews:
    """The splits of a data set as views; ``test`` is None where there are no test pictures."""

    dataset: MaskDataset
    train: MaskView
    val: MaskView
    test: MaskView | None
    digest: str

    @property
    def unseen(self) -> tuple[MaskView, str]:
        """The test pictures, or validation pictures where there are none, and what these are called."""
        return (self.val, "validation") if self.test is None else (self.test, "test")


def train_masks(backbone: Backbone, job: TrainingJob, reporter: Reporter, world: World) -> dict[str, Any] | None:
    """Train, select the best epoch by mIoU on validation pictures, publish the adapter and its card.

    Args:
        job: its recipe is a `MaskRecipe`.

    Returns:
        The summary that ``--json`` prints; None in processes other than the leader.

    Raises:
        GPTServeError: before anything is trained when the task name, the data or the settings cannot work, or when
            another process trains the task.
        KeyboardInterrupt: interrupted; the last finished epoch is stored for ``resume``.
    """
    if job.recipe.final_fit or job.nmi or job.skip_unreadable:
        raise UsageError("--final-fit, --nmi and --skip-unreadable are for classification: leave them out")
    with begun(backbone, job, world) as checkpoint:
        started = time.perf_counter()
        views = _open_views(backbone, job, reporter)
        trainer = _new_trainer(backbone, job, views, reporter, world)
        progress = _fit(trainer, backbone, job, views, checkpoint, reporter)
        if not world.leader:
            return None
        trainer.module.load_state_dict(progress.best)
        summary = _publish(backbone, job, views, trainer.module, progress, time.perf_counter() - started)
        checkpoint.delete()
        return summary


def _open_views(backbone: Backbone, job: TrainingJob, reporter: Reporter) -> MaskViews:
    """All splits, once every picture and label file was looked at.

    Raises:
        DataError: some cannot be used, or an adapter for them could not be stored.
    """
    recipe = _recipe(job)
    preprocess = covered(backbone.spec.preprocess, recipe)
    dataset = open_masks(job.data, recipe.seed, recipe.ignore)
    rehearse(backbone, job, dataset.labels, _build(backbone, recipe, len(dataset.labels)), preprocess)
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    every = [sample for split in splits.values() for sample in split]
    found = iter(scan_masks(dataset, every, preprocess.exif, reporter.scanning(len(every))))
    scans = {name: list(islice(found, len(split))) for name, split in splits.items()}
    for line in (*dataset.unused, *count_lines(dataset.labels, scans)):
        reporter.notice(line)
    augments: dict[str, Augment] = {"train": recipe.augment, "val": "none", "test": "none"}
    made = {name: _view(backbone, dataset, name, scans[name], preprocess, augments[name], recipe) for name in splits}
    hashes = [(name, at, item.digest) for name, own in scans.items() for at, item in enumerate(own)]
    return MaskViews(dataset, made["train"], made["val"], made["test"] if dataset.test else None, digest(hashes))


def _view(
    backbone: Backbone,
    dataset: MaskDataset,
    split: str,
    found: list[Scanned],
    preprocess: Preprocess,
    augment: Augment,
    recipe: MaskRecipe,
) -> MaskView:
    pictures = Pictures(dataset, getattr(dataset, split), preprocess.exif)
    sizes = [item.size for item in found]
    grid = backbone.model.patch_embed.grid_size
    return MaskView(pictures, sizes, preprocess, grid, augment, recipe.seed, recipe.views)


def _recipe(job: TrainingJob) -> MaskRecipe:
    assert isinstance(job.recipe, MaskRecipe)
    return job.recipe


def _build(backbone: Backbone, recipe: MaskRecipe, classes: int) -> MaskModule:
    """The module that the recipe trains, before any training."""
    kind = SetrModule if recipe.head == "setr-pup" else MaskModule
    module = kind.initial(
        backbone,
        recipe.method,
        classes,
        first_block=recipe.named_block,
        taps=mask_taps(recipe, backbone.spec),
        **initial_settings(recipe),
    )
    assert isinstance(module, MaskModule)
    module.grid = backbone.model.patch_embed.grid_size
    if isinstance(module, SetrModule):
        module.head = make_head(CHANNELS, classes, recipe.head_init)
        module.add_decoder(backbone.spec, classes, module.grid)
    return module


def _new_trainer(
    backbone: Backbone, job: TrainingJob, views: MaskViews, reporter: Reporter, world: World
) -> MaskTrainer:
    """A trainer whose tensors are as the recipe and its seed start them; with ``resume`` they are about to change."""
    recipe = _recipe(job)
    torch.manual_seed(recipe.seed)
    module = _build(backbone, recipe, len(views.dataset.labels)).to(backbone.device)
    inputs = Inputs(job.workers)
    if module.trunk:
        inputs = TrunkInputs(backbone, job.workers, module.trunk, module.taps, job.cache_bytes)
    if not job.resume:
        start_masks(backbone, module, job, views.train, inputs, reporter)
    return MaskTrainer(backbone, module, recipe, train=views.train, val=views.val, world=world, inputs=inputs)


def _fit(
    trainer: MaskTrainer,
    backbone: Backbone,
    job: TrainingJob,
    views: MaskViews,
    checkpoint: RunCheckpoint,
    reporter: Reporter,
) -> Progress:
    """Run the epochs that are left; each is stored when it is done."""
    identity = run_identity(backbone.spec, job, views.digest)
    if job.resume:
        trainer.restore(checkpoint.load(identity))
        reporter.notice(f"resuming after epoch {trainer.progress.epoch} of {job.recipe.epochs}")
    elif checkpoint.exists():
        reporter.notice(f"an interrupted run of {job.task!r} is replaced; --resume would have continued it")

    def store_epoch(record: EpochRecord) -> None:
        if trainer.world.leader:
            checkpoint.save(identity, trainer.state())
        reporter.epoch(record)

    steps = -(-len(trainer.train_view) // job.recipe.batch_size) * job.recipe.epochs
    reporter.notice(f"{steps} iterations of batches of {job.recipe.batch_size}; train: pixel accuracy, val: mIoU")
    reporter.training(len(trainer.train_view), trainer.progress.epoch, job.recipe.epochs)
    return trainer.fit(reporter.batch, store_epoch)


def _publish(
    backbone: Backbone, job: TrainingJob, views: MaskViews, module: MaskModule, progress: Progress, seconds: float
) -> dict[str, Any]:
    """Measure on unseen pictures, publish the adapter, write its card; what ``--json`` prints."""
    view, split = views.unseen
    shown: dict[int, Ids] = {}
    step = max(1, len(view.pictures) // EXAMPLES)

    def keep(number: int, mask: Ids) -> None:
        if number % step == 0 and len(shown) < EXAMPLES:
            shown[number] = mask

    confusion, _ = measure(backbone, module, view, Inputs(job.workers), keep)
    training = _describe(job, views, module, progress, confusion, seconds)
    adapter = to_adapter(backbone, job, views.dataset.labels, module, training, view.preprocess)
    adapter = replace(adapter, ignore=views.dataset.ignore)
    revision = AdapterStore(job.adapters).publish(adapter)
    examples = [Example(*view.pictures.read(number), mask) for number, mask in shown.items()]
    _write_card(job, adapter, revision, split, examples)
    head = {"task": job.task, "kind": "segmentation", "method": job.recipe.method, "backbone": backbone.name}
    return head | training | {"revision": revision}


def _write_card(job: TrainingJob, adapter: Adapter, revision: str, split: str, examples: list[Example]) -> None:
    try:
        write_mask_card(job.adapters / job.task, adapter, revision, split, examples)
    except OSError as error:
        raise UsageError(f"the adapter is published, but its card cannot be written: {error.strerror}") from error


def _describe(
    job: TrainingJob,
    views: MaskViews,
    module: MaskModule,
    progress: Progress,
    confusion: Confusion,
    seconds: float,
) -> dict[str, Any]:
    """What the adapter's metadata and card tell about its training."""
    best = progress.best_record
    measured = {"pixel_accuracy": confusion.accuracy}
    if views.test is not None:
        measured = {"test_miou": confusion.miou, "test_pixel_accuracy": confusion.accuracy}
    splits = {"train": views.train, "val": views.val, "test": views.test}
    return {
        "recipe": job.recipe.to_dict(),
        "data": {
            "source": Path(job.data).name if Path(job.data).exists() else job.data,
            "sha256": views.digest,
            **{name: 0 if view is None else len(view.pictures) for name, view in splits.items()},
        },
        "metrics": {
            "val_miou": best.val_accuracy,
            "val_loss": best.val_loss,
            **measured,
            "best_epoch": best.epoch,
            "seconds": round(seconds, 1),
        },
        "iou": confusion.by_class(views.dataset.labels),
        "trainable_parameters": sum(parameter.numel() for parameter in module.parameters()),
    }
