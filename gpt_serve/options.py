"""The options that commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

BUNDLED = "mae-vit-tiny-32"


def _option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


task_option = click.option("--task", required=True, help="Name of the task: a-z 0-9 . _ -, at most 64 characters.")
data_option = click.option("--data", required=True, help="Image folder, or the built-in dataset: digits.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
adapters_option = click.option(
    "--adapters",
    type=click.Path(path_type=Path, file_okay=False),
    default="adapters",
    show_default=True,
    help="Folder of adapters.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
backbone_options = _option_group(
    click.option(
        "--backbone", default=BUNDLED, show_default=True, help="timm name of a plain ViT, or the bundled one."
    ),
    click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights file: MAE, MoCo v3 or timm."),
    click.option("--input-size", type=click.IntRange(1, 4096), help="Side of the input in pixels."),
    device_option,
)
training_options = _option_group(
    click.option("--pool", type=click.Choice(["cls", "mean"]), help="Pooling; the pretraining's own by default."),
    click.option(
        "--method",
        type=click.Choice(["gated", "vpt-shallow", "vpt-deep", "linear"]),
        default="gated",
        show_default=True,
        help="What is learned besides the head.",
    ),
    click.option(
        "--recipe",
        type=click.Choice(["adamw", "paper"]),
        default="adamw",
        show_default=True,
        help="Where the values of the options below come from unless they are given.",
    ),
    click.option("--prompts", type=int, help="Prompt tokens (per block for vpt-deep).  [adamw: 10; paper: 100]"),
    click.option("--gate-init", type=float, help="Gate priors start at minus this.  [adamw: 1; paper: 5]"),
    click.option("--prompt-dropout", type=float, help="Dropout on the prompts.  [0.1]"),
    click.option("--epochs", type=int, help="Passes over the training images.  [adamw: 20; paper: 100]"),
    click.option("--warmup", type=int, help="Epochs of warm-up.  [a tenth of --epochs]"),
    click.option("--lr", type=float, help="Peak learning rate.  [adamw: 0.01; paper: 0.25]"),
    click.option("--head-lr-scale", type=float, help="The head's rate as a multiple of --lr.  [adamw: 2; paper: 1]"),
    click.option("--batch-size", type=int, help="Images per step, over all processes.  [adamw: 16; paper: 64]"),
    click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="[adamw: adamw; paper: sgd]"),
    click.option("--momentum", type=float, help="Momentum of SGD.  [0.9]"),
    click.option("--weight-decay", type=float, help="Weight decay.  [adamw: 0.01; paper: 0]"),
    click.option("--head-init", type=click.Choice(["kaiming", "small"]), help="[adamw: small; paper: kaiming]"),
    click.option(
        "--augment",
        type=click.Choice(["crop-flip", "crop", "none"]),
        help="Random crop and mirror; use crop or none where mirrored images mean something else.  [crop-flip]",
    ),
    click.option("--seed", type=int, help="Of everything random.  [0]"),
    click.option("--resume", is_flag=True, help="Continue the interrupted run of this task."),
    click.option("--skip-unreadable", is_flag=True, help="Train without the images that cannot be read."),
    click.option("--workers", type=click.IntRange(0, 256), default=2, show_default=True, help="Decoding processes."),
)
