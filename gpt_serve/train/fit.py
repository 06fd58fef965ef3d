"""From a dataset to a published adapter."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import taps_of
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import DataError
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import BackboneSpec, Preprocess, Tap, check_task_name
from gpt_serve.train.checkpoint import RunCheckpoint, held, run_folder
from gpt_serve.train.conclusion import conclude
from gpt_serve.train.data.counts import count_lines
from gpt_serve.train.data.datasets import Dataset, Split, digest, open_dataset
from gpt_serve.train.data.duplicates import near_duplicates
from gpt_serve.train.data.views import CACHE_BYTES, Scan, View, joined, scan
from gpt_serve.train.distributed import World
from gpt_serve.train.inputs import Inputs, TrunkInputs
from gpt_serve.train.job import Reporter, TrainingJob, Views
from gpt_serve.train.loop import EpochRecord, Trainer
from gpt_serve.train.methods.heads import left_out_logits
from gpt_serve.train.methods.modules import FullModule, TaskModule
from gpt_serve.train.methods.prompts import AdapterModule, find_method
from gpt_serve.train.methods.start import fit_head, start_from_data
from gpt_serve.train.methods.taps import AUTO, Choice, candidates, choose, images_read, parse_taps
from gpt_serve.train.nmi import nmi_probe
from gpt_serve.train.publishing import describe, publish_trained, rehearse, to_adapter
from gpt_serve.train.recipes.recipe import Recipe, prepared


def train_adapter(backbone: Backbone, job: TrainingJob, reporter: Reporter, world: World) -> dict[str, Any] | None:
    """Train, select the best epoch on validation data, or the last of a final fit; publish the adapter and its card.

    Returns:
        The summary that ``--json`` prints; None in processes other than the leader.

    Raises:
        GPTServeError: before anything is trained when the task name, the data or the settings cannot work, or when
            another process trains the task.
        KeyboardInterrupt: interrupted; the last finished epoch is stored for ``resume``.
    """
    with begun(backbone, job, world):
        started = time.perf_counter()
        return train_on(backbone, prepare(backbone, job, reporter), job, reporter, world, started)


@contextmanager
def begun(backbone: Backbone, job: TrainingJob, world: World) -> Iterator[RunCheckpoint]:
    """Hold the task's `run_folder`, in the leading process, until the block ends; what is stored there is given.

    Raises:
        GPTServeError: the task's name cannot be one, another process trains it, or there is nothing to resume.
    """
    check_task_name(job.task)
    with held(run_folder(job.adapters, job.task)) if world.leader else nullcontext():
        checkpoint = RunCheckpoint(job.adapters, job.task)
        if job.resume:
            checkpoint.require()
        make_deterministic(backbone)
        yield checkpoint


def train_on(
    backbone: Backbone, views: Views, job: TrainingJob, reporter: Reporter, world: World, started: float
) -> dict[str, Any] | None:
    """`train_adapter` for one who holds the task's `run_folder` and has what `prepare` gives.

    Args:
        started: ``time.perf_counter()`` when the run began.
    """
    checkpoint = RunCheckpoint(job.adapters, job.task)
    trainer = new_trainer(backbone, job, views, reporter, world)
    module = trainer.module
    identity = run_identity(backbone.spec, job, views.digest)
    if job.resume:
        trainer.restore(checkpoint.load(identity))
        reporter.notice(f"resuming after epoch {trainer.progress.epoch} of {job.recipe.epochs}")
    elif checkpoint.exists():
        reporter.notice(f"an interrupted run of {job.task!r} is replaced; --resume would have continued it")

    def store_epoch(record: EpochRecord) -> None:
        if world.leader:
            checkpoint.save(identity, trainer.state())
        reporter.epoch(record)

    started_from = trainer.score_start().start
    if job.instant and started_from is not None and job.recipe.epochs and world.leader:
        _publish_start(backbone, job, views, trainer, reporter, time.perf_counter() - started)
    reporter.training(len(trainer.train_view), trainer.progress.epoch, job.recipe.epochs)
    progress = trainer.fit(reporter.batch, store_epoch)
    if not world.leader:
        return None
    module.load_state_dict(progress.best)

    def refit() -> tuple[Tensor, Tensor]:
        parts = (views.train, views.val)
        seen, targets = fit_head(backbone, module, job.recipe, parts, trainer.inputs, reporter)
        return left_out_logits(seen, targets, len(views.labels)), targets

    # Labels' thresholds are those of validation images, which the head must not have been fitted to.
    again = refit if job.recipe.refit and not views.val.classes else None
    end = conclude(backbone, module, views, trainer.inputs, reporter, final_fit=job.recipe.final_fit, refit=again)
    training = describe(job, views, module, progress, time.perf_counter() - started)
    if views.test is not None:
        training["metrics"] |= {f"test_{name}": value for name, value in end.answers.metrics.items()}
    if end.calibration:
        training["calibration"] = end.calibration
    summary = publish_trained(backbone, job, views, module, training, end)
    checkpoint.delete()
    return summary


def _publish_start(
    backbone: Backbone, job: TrainingJob, views: Views, trainer: Trainer, reporter: Reporter, seconds: float
) -> None:
    """A new task answers with what its training starts from; an adapter that is there already stays until the end."""
    store = AdapterStore(job.adapters)
    if not isinstance(trainer.module, AdapterModule) or job.task in store.tasks():
        return
    training = describe(job, views, trainer.module, trainer.progress, seconds)
    revision = store.publish(to_adapter(backbone, job, views.labels, trainer.module, training, views.train.preprocess))
    accuracy = trainer.progress.best_record.val_accuracy
    shown = "" if math.isnan(accuracy) else f", validation accuracy {100 * accuracy:.1f} %"
    reporter.notice(f"published {job.task!r} as it starts ({revision}{shown}, {seconds:.0f} s); training goes on")


def make_deterministic(backbone: Backbone) -> None:
    """The same seed gives the same adapter; CUDA kernels without a deterministic form warn."""
    if backbone.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def prepare(backbone: Backbone, job: TrainingJob, reporter: Reporter) -> Views:
    """The images of the run, with the preprocessing that the recipe has for them.

    Raises:
        DataError: they cannot be trained on, or an adapter for them could not be stored.
    """
    preprocess, dataset = open_data(backbone.spec, job)
    if not find_method(job.recipe.method).full:
        module = build_module(backbone, job.recipe, len(dataset.labels))
        assert isinstance(module, AdapterModule)
        rehearse(backbone, job, dataset.labels, module, preprocess)
    return load_views(dataset, preprocess, job, reporter)


def open_data(spec: BackboneSpec, job: TrainingJob) -> tuple[Preprocess, Dataset]:
    """The data set of the run, and how the recipe prepares its images for a backbone of ``spec``.

    Raises:
        DataError: it cannot be trained on.
    """
    dataset = open_dataset(job.data, job.recipe.seed)
    if job.recipe.final_fit and not dataset.test:
        raise DataError(
            f"--final-fit leaves only test images to report on, and --data {job.data} has none: leave it out"
        )
    return prepared(spec.preprocess, job.recipe.preprocess), dataset


def new_trainer(backbone: Backbone, job: TrainingJob, views: Views, reporter: Reporter, world: World) -> Trainer:
    """A trainer whose tensors are as the recipe and its seed start them.

    With ``resume`` a checkpoint is about to replace them, so nothing is computed from the training images.

    Raises:
        UsageError: there are fewer tokens than prompts.
    """
    recipe = job.recipe
    train, val = (joined(views.train, views.val), None) if recipe.final_fit else (views.train, views.val)
    torch.manual_seed(recipe.seed)
    choice, computed = _choice(backbone, job, views, reporter)
    module = build_module(backbone, recipe, len(views.labels), choice).to(backbone.device)
    inputs = _inputs(backbone, module, job, computed)
    if not job.resume:
        start_from_data(backbone, module, job, train, inputs, reporter)
    nmi = None
    if job.nmi and isinstance(module, AdapterModule):
        nmi = nmi_probe(backbone, module, val or train.drawn("none"))
    return Trainer(backbone, module, recipe, train=train, val=val, world=world, inputs=inputs, nmi=nmi)


def _inputs(backbone: Backbone, module: TaskModule, job: TrainingJob, computed: Inputs | None) -> Inputs:
    """What training gives to ``module``: images, or what the blocks before the first that it touches make of them.

    Args:
        computed: what all blocks make of them, if there is such a thing: it serves where ``module`` is a head alone.
    """
    blocks = module.trunk if isinstance(module, AdapterModule) else 0
    if computed is not None and blocks == backbone.spec.depth:
        return computed
    if not isinstance(module, AdapterModule) or not blocks:
        return Inputs(job.workers)
    prompts = 0 if module.prompt is None else module.prompt.shape[1]
    taps = taps_of(module.taps, module.pool, depth=backbone.spec.depth, prompts=prompts)
    return TrunkInputs(backbone, job.workers, blocks, taps, job.cache_bytes)


def _choice(
    backbone: Backbone, job: TrainingJob, views: Views, reporter: Reporter
) -> tuple[Choice, TrunkInputs | None]:
    """What the head reads and which block prompts enter, chosen on validation images where the recipe leaves it open.

    Returns:
        The choice, and the inputs that it was made with, if it was.
    """
    recipe, spec = job.recipe, backbone.spec
    choice = Choice(parse_taps(recipe.taps, spec), recipe.named_block)
    if AUTO not in (recipe.taps, recipe.first_block):
        return choice, None
    # Without prompts the mean over all tokens is that of the patches, which heads are then said to read.
    taps = dict.fromkeys([*candidates(backbone), Tap(spec.depth - 1, "patches")])
    inputs = TrunkInputs(backbone, job.workers, spec.depth, tuple(taps), job.cache_bytes)
    tick = reporter.scanning(images_read(views.train, views.val), "comparing blocks")
    found = choose(backbone, views.train, views.val, len(views.labels), inputs, tick)
    if recipe.taps == AUTO:
        choice = replace(choice, taps=found.taps)
        shown = ", ".join(f"{tap.pool} after block {tap.block}" for tap in found.taps)
        reporter.notice(f"the head reads {shown}" if shown else "the head reads the last block alone")
    if recipe.first_block == AUTO:
        choice = replace(choice, first_block=found.first_block)
        reporter.notice(f"prompts enter block {found.first_block} of {spec.depth}, counted from 0")
    return choice, inputs


def build_module(backbone: Backbone, recipe: Recipe, classes: int, choice: Choice | None = None) -> TaskModule:
    """The module that the recipe trains for ``classes`` classes, before any training.

    Args:
        choice: what the head reads and which block prompts enter; None for the last block and what the recipe says.
    """
    if choice is None:
        choice = Choice(first_block=recipe.named_block)
    if find_method(recipe.method).full:
        return FullModule(backbone, classes, recipe.head_init)
    return AdapterModule.initial(
        backbone,
        recipe.method,
        classes,
        first_block=choice.first_block,
        taps=choice.taps,
        **initial_settings(recipe),
    )


def initial_settings(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `AdapterModule.initial` that every recipe names."""
    return {
        "prompts": recipe.prompts,
        "gate_init": recipe.gate_init,
        "prompt_dropout": recipe.prompt_dropout,
        "head_init": recipe.head_init,
        "hard": recipe.gate == "hard",
        "tempered": recipe.tempered,
        "norm": recipe.norm,
    }


def load_views(dataset: Dataset, preprocess: Preprocess, job: TrainingJob, reporter: Reporter) -> Views:
    """Check that every image can be read, before anything trains, say what there is of each class, wrap the splits.

    Raises:
        DataError: some cannot and ``skip_unreadable`` is off, or too few are left.
    """
    splits: dict[str, Split] = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    for line in dataset.unused:
        reporter.notice(line)
    tick = reporter.scanning(sum(len(split) for split in splits.values()))
    scans: dict[str, Scan] = {}
    for name, split in splits.items():
        scans[name] = scan(split, preprocess, tick, CACHE_BYTES - sum(done.cached for done in scans.values()))
    bad = [image for result in scans.values() for image in result.unreadable]
    if bad:
        reporter.unreadable(bad)
        total = sum(len(split) for split in splits.values())
        if not job.skip_unreadable:
            raise DataError(
                f"{len(bad)} of {total} images cannot be read (listed above): "
                "replace or remove them, or pass --skip-unreadable"
            )
        return load_views(_without(dataset, {image.name for image in bad}), preprocess, job, reporter)
    for line in count_lines(dataset.labels, splits):
        reporter.notice(line)
    hashes = [
        ("/".join([name, *(dataset.labels[target] for target in sample.targets)]), index, value)
        for name, split in splits.items()
        for index, (sample, value) in enumerate(zip(split, scans[name].hashes, strict=True))
    ]
    seed = job.recipe.seed
    view = {
        name: View(
            split,
            preprocess,
            scans[name].scaled,
            job.recipe.augment if name == "train" else "none",
            seed,
            job.recipe.views,
            len(dataset.labels) if dataset.multi_label else 0,
        )
        for name, split in splits.items()
    }
    duplicates = near_duplicates({name: (split, scans[name].thumbnails) for name, split in splits.items()})
    test = view["test"] if dataset.test else None
    return Views(dataset.labels, view["train"], view["val"], test, digest(hashes), tuple(duplicates))


def _without(dataset: Dataset, names: set[str]) -> Dataset:
    def keep(split: Split) -> Split:
        return [sample for sample in split if sample.name not in names]

    kept = replace(dataset, unused=(), train=keep(dataset.train), val=keep(dataset.val), test=keep(dataset.test))
    gone = sorted(_present(dataset.train) - _present(kept.train))
    if gone or not kept.val:
        without = ", ".join(dataset.labels[target] for target in gone[:5]) or "validation"
        raise DataError(f"no readable images are left for {without}: add some")
    return kept


def _present(split: Split) -> set[int]:
    """The classes that some image of a split has."""
    return {target for sample in split for target in sample.targets}


def run_identity(spec: BackboneSpec, job: TrainingJob, data: str) -> dict[str, Any]:
    """What must be equal for a run to continue, as plain JSON values; ``data`` is the images' digest."""
    identity = {"task": job.task, "backbone": spec.fingerprint, "pool": spec.pool, "data": data}
    return identity | {"input_size": list(spec.preprocess.input_size)} | {"nmi": job.nmi, **job.recipe.to_dict()}
