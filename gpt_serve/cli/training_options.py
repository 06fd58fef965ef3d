"""The options of the commands that fit adapters."""

from typing import Any, get_args

import click

from gpt_serve.cli.options import ByteSize, option_group
from gpt_serve.specs import Kind, Pool


class Values(click.ParamType[tuple[Any, ...]]):
    """Numbers, separated by commas: ``0.05,0.1``."""

    name = "list"

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The numbers."""
        return tuple(self.kind.convert(item.strip(), param, ctx) for item in str(value).split(","))


class BlockIndex(click.ParamType[Any]):
    """A block, counted from 0, or ``auto``."""

    name = "block"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or ``auto``."""
        if value == "auto":
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither auto nor the number of a block, counted from 0", param, ctx)
        return int(value)


PROMPTED = ("gated", "gated-deep", "vpt-shallow", "vpt-deep", "spt-shallow", "spt-deep")
_method_options = option_group(
    click.option("--pool", type=click.Choice(get_args(Pool)), help="Pooling; the pretraining's own by default."),
    click.option(
        "--method",
        type=click.Choice([*PROMPTED, *(f"{name}+shift" for name in PROMPTED), "linear", "bias", "full"]),
        help="What is learned besides the head; +shift: vectors that the blocks add, too, which is all that biases can "
        "do; bias: these alone; full: the whole backbone, which is not served.  [gated; spt: spt-deep]",
    ),
    click.option(
        "--recipe",
        type=click.Choice(["auto", "lda", "instant", "adamw", "full", "paper", "spt"]),
        default="auto",
        show_default=True,
        help="Where the options below come from unless they are given. instant: taps and head in closed form, without "
        "training; paper: SGD, with the row of the paper's Table 5 "
        "for task and backbone; auto: that row for --method gated, lda where there is none or the backbone is bundled; "
        "full for --method full; spt for spt-* on published backbones; adamw for other methods.",
    ),
)
_recipe_options = option_group(
    click.option(
        "--prompt-init",
        type=click.Choice(["random", "tokens", "kmeans", "mean", "max"]),
        help="Random prompts, or tokens of training images: drawn, k-means centres, pooled.  "
        "[lda, spt-*: tokens; random]",
    ),
    click.option("--prompt-dropout", type=float, help="Dropout on the prompts.  [0.1; spt: 0]"),
    click.option(
        "--first-block",
        type=BlockIndex(),
        help="Block that prompts enter, counted from 0; auto: chosen on validation images.  [0]",
    ),
    click.option(
        "--taps",
        help="What the head reads: last block, auto (chosen on validation images), or e.g. 11:cls,9:patches.  "
        "[lda, instant: auto; last]",
    ),
    click.option(
        "--norm",
        type=click.Choice(["pretrained", "fresh", "standard"]),
        help="Before the head: the backbone's own; a fresh, frozen one; or features standardised.  "
        "[lda: standard; pretrained]",
    ),
    click.option(
        "--gate",
        type=click.Choice(["soft", "hard"]),
        help="Gates between 0 and 1, or of 0 or 1 (Gumbel-sigmoid, straight-through).  [soft]",
    ),
    click.option(
        "--temperature/--no-temperature",
        default=None,
        help="Learn attention temperatures or leave them at 1.  [gated, gated-deep: learn]",
    ),
    click.option("--epochs", type=int, help="Passes over the training images.  [lda, adamw: 20; paper, spt: 100]"),
    click.option("--warmup", type=int, help="Epochs of warm-up.  [a tenth of --epochs]"),
    click.option(
        "--schedule", type=click.Choice(["epoch", "step"]), help="When the rate changes.  [epoch; lda, spt: step]"
    ),
    click.option("--min-lr", type=float, help="Final learning rate.  [0; spt: 1e-8]"),
    click.option(
        "--head-lr-scale",
        type=float,
        help="The head's rate as a multiple of --lr.  [lda: so that it is 0.002; adamw: 2; paper, spt: 1]",
    ),
    click.option(
        "--batch-size", type=int, help="Images per step, over all processes.  [lda, adamw: 16; paper: 64; spt: 32]"
    ),
    click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="[lda, adamw, spt: adamw; paper: sgd]"),
    click.option("--momentum", type=float, help="Momentum of SGD.  [0.9]"),
    click.option("--weight-decay", type=float, help="Weight decay.  [lda, adamw, spt: 0.01; paper: 0]"),
    click.option("--head-weight-decay", type=float, help="Weight decay of the head.  [--weight-decay; spt: 0.5]"),
    click.option(
        "--head-init",
        type=click.Choice(["kaiming", "small", "tiny", "lda"]),
        help="Random, or by discriminant analysis of the training images.  [lda: lda; adamw: small; paper: kaiming; "
        "spt: small, tiny with MoCo v3]",
    ),
    click.option(
        "--augment",
        type=click.Choice(["crop-flip", "crop", "none"]),
        help="Random crop and mirror; use crop or none where mirrored images mean something else.  [crop-flip]",
    ),
    click.option(
        "--views",
        type=int,
        help="Augmented images of each, which epochs take in turn: what blocks before --first-block give is computed "
        "once for each. 0: new ones every epoch.  [0]",
    ),
    click.option(
        "--preprocess",
        type=click.Choice(["backbone", "fgvc", "vtab"]),
        help="Scaling and crop: the backbone's own, or as a benchmark has it.  [that of --data, else backbone]",
    ),
    click.option(
        "--select",
        type=click.Choice(["accuracy", "loss"]),
        help="What the published epoch is best in, on validation images; loss for few.  [accuracy; lda: loss]",
    ),
    click.option(
        "--final-fit/--no-final-fit",
        default=None,
        help="Train on validation images, too, and publish the last epoch, to report on test.  [VTAB-1K: --final-fit]",
    ),
    click.option(
        "--refit/--no-refit",
        default=None,
        help="Once the best epoch is chosen, fit the head to all images, validation too.  [instant: --refit]",
    ),
    click.option("--seed", type=int, help="Of everything random.  [0]"),
    click.option("--resume", is_flag=True, help="Continue the interrupted run of this task."),
)
training_options = option_group(
    _method_options,
    click.option(
        "--prompts",
        type=int,
        help="Prompt tokens (per block for deep ones).  [lda, adamw: 10; paper: 100; spt: 20, shallow 100]",
    ),
    click.option("--gate-init", type=float, help="Gate priors start at minus this.  [lda, adamw, spt: 1; paper: 5]"),
    click.option("--lr", type=float, help="Peak learning rate.  [lda: 0.05; adamw: 0.01; paper: 0.25; spt: 0.05]"),
    _recipe_options,
)
ray_option = click.option(
    "--ray-address",
    default="local",
    show_default=True,
    help="Ray cluster to train on: auto for this machine's, or HOST:PORT. local: this machine alone.",
)
sweep_options = option_group(
    _method_options,
    click.option(
        "--lr",
        type=Values(click.FLOAT),
        help="Peak learning rates.  [lda: 0.005 to 0.5; sgd: 0.05 to 5; adamw: 0.0005 to 0.05]",
    ),
    click.option("--gate-init", type=Values(click.FLOAT), help="Gate priors start at minus these.  [Table 5: 1 to 20]"),
    click.option("--prompts", type=Values(click.INT), help="Numbers of prompt tokens.  [Table 5: 1,5,10,100]"),
    click.option("--samples", type=click.IntRange(1), help="Try so many points of the grid, drawn by --seed.  [all]"),
    click.option("--early-stop", is_flag=True, help="Stop trials that fall behind the others (ASHA)."),
    click.option("--jobs", type=click.IntRange(1), help="Trials at a time.  [one a GPU; on CPUs one per 4 cores]"),
    ray_option,
    _recipe_options,
)
reading_options = option_group(
    click.option("--skip-unreadable", is_flag=True, help="Train without the images that cannot be read."),
    click.option("--workers", type=click.IntRange(0, 256), default=2, show_default=True, help="Decoding processes."),
)
cache_option = click.option(
    "--cache-bytes",
    type=ByteSize(),
    default="4G",
    show_default=True,
    help="Room in a temporary file for what the blocks before --first-block give, which training computes once.",
)
closing_options = option_group(
    click.option(
        "--tolerance",
        type=float,
        default=0.0,
        show_default=True,
        metavar="POINTS",
        help="Percentage points of validation accuracy that closed gates may cost.",
    ),
    click.option("--epochs", type=int, help="Of each of at most 4 fine-tunes.  [a quarter of training's, at least 5]"),
    click.option("--lr", type=float, help="Peak learning rate of the fine-tunes.  [a quarter of training's]"),
)
mask_options = option_group(
    click.option(
        "--kind",
        type=click.Choice(get_args(Kind)),
        help="What the task answers: one class an image, or one a pixel.  [what --data is for]",
    ),
    click.option(
        "--head",
        type=click.Choice(["linear", "setr-pup"]),
        help="Segmentation: a linear classifier on each patch, or the paper's decoder.  [linear; paper: setr-pup]",
    ),
    click.option(
        "--geometry",
        type=click.Choice(["squash", "pad", "windows"]),
        help="Segmentation: how an image becomes inputs of the backbone; windows overlap.  [windows]",
    ),
    click.option(
        "--window",
        type=float,
        help="Share of the scaled image's shorter side that a window covers.  [0.7; paper: 1]",
    ),
    click.option(
        "--ignore",
        type=Values(click.IntRange(0, 255)),
        help="Values of label files that belong to no class, such as 0,255.  [255; ade20k: 0]",
    ),
)
