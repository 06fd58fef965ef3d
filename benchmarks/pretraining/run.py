"""Make the bundled backbone, and measure how good frozen weights are.

    python benchmarks/pretraining/run.py train --data ../shared/data/tiny-imagenet-32.tar.xz --output pretrained
    python benchmarks/pretraining/run.py evaluate --data ../shared/data/flowers12 --checkpoint pretrained/FILE

``train`` needs ``pip install -e '.[pretrain]'``.
"""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt_serve.cli.main import Group
from gpt_serve.cli.options import device_option, resolve_device
from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.errors import UsageError

if TYPE_CHECKING:
    from loop import Epoch

DEFAULTS: dict[str, dict[str, Any]] = {
    "mae": {
        "epochs": 400,
        "batch_size": 512,
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "weight_decay": 0.05,
        "warmup": 0.05,
    },
    "mocov3": {
        "epochs": 300,
        "batch_size": 1024,
        "lr": 6e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.1,
        "warmup": 40 / 300,
    },
}


def _by_method(field: str) -> str:
    return ", ".join(f"{method}: {values[field]:g}" for method, values in DEFAULTS.items())


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Pretrain the bundled backbone without labels, and compare weights."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    reuse_freed_memory()


@main.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="tar archive or folder of images below train/ and so on.",
)
@click.option("--splits", default="train,test", show_default=True, help="Folders of --data to learn from.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="pretrained",
    show_default=True,
    help="Folder for the weights, their card, the checkpoint and the decoded images (3 KB each).",
)
@click.option("--method", type=click.Choice(list(DEFAULTS)), default="mae", show_default=True)
@click.option("--epochs", type=click.IntRange(1), help=f"Default for {_by_method('epochs')}.")
@click.option("--batch-size", type=click.IntRange(2), help=f"Default for {_by_method('batch_size')}.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help=f"Default for {_by_method('lr')}.")
@click.option("--seed", type=click.IntRange(0, 1_000_000), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Continue the interrupted run in --output.")
@click.option("--probe", "sources", multiple=True, help="Image folder to measure the result on; repeatable.")
@device_option
def train(
    data: Path, splits: str, output: Path, method: str, resume: bool, sources: Sequence[str], device: str, **given: Any
) -> None:
    """Pretrain anew; writes METHOD-vit-tiny-32.safetensors and README.md."""
    try:
        from job import Job, pretrain
        from loop import Recipe
    except ModuleNotFoundError as error:
        raise UsageError(f"the module {error.name} is missing: pip install 'gpt-serve[pretrain]'") from error

    settings = DEFAULTS[method] | {key: value for key, value in given.items() if value is not None}
    recipe = Recipe(method, **settings)
    job = Job(data, splits.split(","), output, recipe, resolve_device(device), resume, sources)
    path = pretrain(job, lambda epoch: click.echo(_line(epoch, recipe.epochs)), lambda line: click.echo(line, err=True))
    click.echo(f"wrote {path} and its README.md", err=True)


def _line(epoch: "Epoch", epochs: int) -> str:
    left = datetime.timedelta(seconds=round(epoch.left))
    return f"epoch {epoch.number}/{epochs}  loss {epoch.loss:.4f}  {epoch.speed:,.0f} images/s  {left} left"


@main.command()
@click.option("--data", "sources", multiple=True, required=True, help="Image folder with train/ and test/; repeatable.")
@click.option("--checkpoint", "paths", multiple=True, type=click.Path(path_type=Path), help="Weights; repeatable.")
@device_option
def evaluate(sources: Sequence[str], paths: Sequence[Path], device: str) -> None:
    """Nearest neighbours and a linear probe on frozen features, of the bundled weights and of each --checkpoint."""
    from probe import compare

    click.echo("\n".join(compare([None, *paths], sources, resolve_device(device))))


if __name__ == "__main__":
    main()
