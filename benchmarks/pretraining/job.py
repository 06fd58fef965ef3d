"""One pretraining from images to weights and card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from loop import Epoch, Recipe, Run
from mae import MAE
from mocov3 import MoCoV3
from pixels import load_pixels
from probe import compare
from result import card, save_weights

from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone, create_bundled
from gpt_serve.model.catalog import TINY
from gpt_serve.train.checkpoint import RunCheckpoint, held, run_folder

MODELS = {"mae": MAE, "mocov3": MoCoV3}


@dataclass(frozen=True)
class Job:
    """What to pretrain on and where to leave the result.

    Attributes:
        splits: folders of ``data`` whose images are taken.
        sources: image folders to measure the result on, for the card.
    """

    data: Path
    splits: Sequence[str]
    output: Path
    recipe: Recipe
    device: str
    resume: bool
    sources: Sequence[str]


def pretrain(job: Job, report: Callable[[Epoch], None], notice: Callable[[str], None]) -> Path:
    """Run ``job`` and write ``<method>-vit-tiny-32.safetensors`` and ``README.md`` into its output folder.

    Returns:
        The path of the weights.

    Raises:
        GPTServeError: one line for the user.
        KeyboardInterrupt: interrupted; the last finished epoch is stored for ``resume``.
    """
    with held(run_folder(job.output, _name(job))):
        return _pretrain(job, report, notice)


def _pretrain(job: Job, report: Callable[[Epoch], None], notice: Callable[[str], None]) -> Path:
    checkpoint = _open_checkpoint(job)
    scaling = replace(Backbone.load(TINY.name).spec.preprocess, crop_pct=1.0)
    pixels, digest = load_pixels(job.data, job.splits, scaling, job.output)
    torch.manual_seed(job.recipe.seed)
    model = MODELS[job.recipe.method](create_bundled(TINY)).to(job.device)
    run = Run(model, pixels.to(job.device), job.recipe, checkpoint, digest)
    if job.resume:
        run.resume()
    notice(f"{len(pixels):,} images, epochs {len(run.losses) + 1} to {job.recipe.epochs} on {_device(job.device)}")
    try:
        run.finish(report)
    except KeyboardInterrupt:
        notice(f"stopped after epoch {len(run.losses)}: repeat the command with --resume to continue")
        raise
    return _publish(job, run)


def _open_checkpoint(job: Job) -> RunCheckpoint:
    checkpoint = RunCheckpoint(job.output, _name(job))
    if job.resume:
        checkpoint.require()
    elif checkpoint.exists():  # hours on a GPU, so it is not replaced unasked
        raise UsageError(f"{checkpoint.path} holds an interrupted run: add --resume, or delete the file to begin anew")
    return checkpoint


def _publish(job: Job, run: Run) -> Path:
    path = job.output / f"{_name(job)}.safetensors"
    save_weights(run.model.vit, job.recipe.method, path)
    measured = compare([path], job.sources, job.device) if job.sources else []
    trained = f"{len(run.pixels):,} images of {job.data.name} ({', '.join(job.splits)}), no labels; "
    trained += f"{run.seconds / 60:.0f} minutes on {_device(job.device)}"
    (job.output / "README.md").write_text(card(_name(job), job.recipe, trained, run.losses, measured), encoding="utf-8")
    run.checkpoint.delete()
    return path


def _name(job: Job) -> str:
    return f"{job.recipe.method}-vit-tiny-32"


def _device(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} CPU threads"
