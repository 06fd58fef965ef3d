"""The options that commands share."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from gpt_serve.errors import UsageError

BUNDLED = "mae-vit-tiny-32"


class ByteSize(click.ParamType[int]):
    """A number of bytes: ``1048576``, ``1024K``, ``1M``, ``0.5G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:I?B)?", str(value).strip().upper())
        if match is None:
            self.fail(f"{value!r} is not a size: give bytes, or a number with K, M, G or T, such as 512M", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


class Values(click.ParamType[tuple[Any, ...]]):
    """Numbers, separated by commas: ``0.05,0.1``."""

    name = "list"

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The numbers."""
        return tuple(self.kind.convert(item.strip(), param, ctx) for item in str(value).split(","))


def _option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


task_option = click.option("--task", required=True, help="Name of the task: a-z 0-9 . _ -, at most 64 characters.")
DATA_KINDS = "Image folder, digits, fgvc/TASK, vtab/TASK, torchvision:CLASS or hf:OWNER/NAME."
data_option = click.option("--data", required=True, help=DATA_KINDS)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
adapters_option = click.option(
    "--adapters",
    type=click.Path(path_type=Path, file_okay=False),
    default="adapters",
    show_default=True,
    help="Folder of adapters.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
weights_options = _option_group(
    click.option(
        "--backbone", default=BUNDLED, show_default=True, help="timm name of a plain ViT, or the bundled one."
    ),
    click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights file: MAE, MoCo v3 or timm."),
    click.option("--input-size", type=click.IntRange(1, 4096), help="Side of the input in pixels."),
)
backbone_options = _option_group(weights_options, device_option)
_method_options = _option_group(
    click.option("--pool", type=click.Choice(["cls", "mean"]), help="Pooling; the pretraining's own by default."),
    click.option(
        "--method",
        type=click.Choice(
            ["gated", "gated-deep", "vpt-shallow", "vpt-deep", "spt-shallow", "spt-deep", "linear", "full"],
        ),
        help="What is learned besides the head; full: the whole backbone, which is not served.  [gated; spt: spt-deep]",
    ),
    click.option(
        "--recipe",
        type=click.Choice(["auto", "adamw", "full", "paper", "spt"]),
        default="auto",
        show_default=True,
        help="Where the options below come from unless they are given. paper: SGD, with the row of the paper's Table 5 "
        "for task and backbone; auto: that row for gated prompts, full for --method full, but adamw for others and the "
        "bundled backbone.",
    ),
)
_recipe_options = _option_group(
    click.option(
        "--prompt-init",
        type=click.Choice(["random", "tokens", "kmeans", "mean", "max"]),
        help="Random prompts, or tokens of training images: drawn, k-means centres, pooled.  [spt-*: tokens; random]",
    ),
    click.option("--prompt-dropout", type=float, help="Dropout on the prompts.  [0.1; spt: 0]"),
    click.option("--first-block", type=int, help="Block that prompts enter, counted from 0.  [0]"),
    click.option(
        "--norm",
        type=click.Choice(["pretrained", "fresh", "standard"]),
        help="Before the head: the backbone's own; a fresh, frozen one; or features standardised.  [pretrained]",
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
    click.option("--epochs", type=int, help="Passes over the training images.  [adamw: 20; paper, spt: 100]"),
    click.option("--warmup", type=int, help="Epochs of warm-up.  [a tenth of --epochs]"),
    click.option("--schedule", type=click.Choice(["epoch", "step"]), help="When the rate changes.  [epoch; spt: step]"),
    click.option("--min-lr", type=float, help="Final learning rate.  [0; spt: 1e-8]"),
    click.option(
        "--head-lr-scale", type=float, help="The head's rate as a multiple of --lr.  [adamw: 2; paper, spt: 1]"
    ),
    click.option(
        "--batch-size", type=int, help="Images per step, over all processes.  [adamw: 16; paper: 64; spt: 32]"
    ),
    click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="[adamw, spt: adamw; paper: sgd]"),
    click.option("--momentum", type=float, help="Momentum of SGD.  [0.9]"),
    click.option("--weight-decay", type=float, help="Weight decay.  [adamw, spt: 0.01; paper: 0]"),
    click.option("--head-weight-decay", type=float, help="Weight decay of the head.  [--weight-decay; spt: 0.5]"),
    click.option(
        "--head-init",
        type=click.Choice(["kaiming", "small", "tiny"]),
        help="[adamw: small; paper: kaiming; spt: small, tiny with MoCo v3]",
    ),
    click.option(
        "--augment",
        type=click.Choice(["crop-flip", "crop", "none"]),
        help="Random crop and mirror; use crop or none where mirrored images mean something else.  [crop-flip]",
    ),
    click.option(
        "--preprocess",
        type=click.Choice(["backbone", "fgvc", "vtab"]),
        help="Scaling and crop: the backbone's own, or as a benchmark has it.  [that of --data, else backbone]",
    ),
    click.option(
        "--final-fit/--no-final-fit",
        default=None,
        help="Train on validation images, too, and publish the last epoch, to report on test.  [VTAB-1K: --final-fit]",
    ),
    click.option("--seed", type=int, help="Of everything random.  [0]"),
    click.option("--resume", is_flag=True, help="Continue the interrupted run of this task."),
)
training_options = _option_group(
    _method_options,
    click.option(
        "--prompts",
        type=int,
        help="Prompt tokens (per block for deep ones).  [adamw: 10; paper: 100; spt: 20, shallow 100]",
    ),
    click.option("--gate-init", type=float, help="Gate priors start at minus this.  [adamw, spt: 1; paper: 5]"),
    click.option("--lr", type=float, help="Peak learning rate.  [adamw: 0.01; paper: 0.25; spt: 0.05]"),
    _recipe_options,
)
sweep_options = _option_group(
    _method_options,
    click.option(
        "--lr", type=Values(click.FLOAT), help="Peak learning rates.  [sgd: 0.05 to 5; adamw: 0.0005 to 0.05]"
    ),
    click.option("--gate-init", type=Values(click.FLOAT), help="Gate priors start at minus these.  [Table 5: 1 to 20]"),
    click.option("--prompts", type=Values(click.INT), help="Numbers of prompt tokens.  [Table 5: 1,5,10,100]"),
    click.option("--samples", type=click.IntRange(1), help="Try so many points of the grid, drawn by --seed.  [all]"),
    click.option("--early-stop", is_flag=True, help="Stop trials that fall behind the others (ASHA)."),
    click.option("--jobs", type=click.IntRange(1), help="Trials at a time.  [one a GPU; on CPUs one per 4 cores]"),
    click.option(
        "--ray-address",
        default="local",
        show_default=True,
        help="Ray cluster to run trials on: auto for this machine's, or HOST:PORT. local starts Ray for this command.",
    ),
    _recipe_options,
)
reading_options = _option_group(
    click.option("--skip-unreadable", is_flag=True, help="Train without the images that cannot be read."),
    click.option("--workers", type=click.IntRange(0, 256), default=2, show_default=True, help="Decoding processes."),
)
closing_options = _option_group(
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
serving_options = _option_group(
    click.option(
        "--engine",
        type=click.Choice(["auto", "torch", "onnx"]),
        default="auto",
        show_default=True,
        help="What runs the forward pass; auto: onnx (onnxruntime) on the CPU, torch on a GPU.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        default="fp32",
        show_default=True,
        help="Of weights and activations; bf16 is faster where the processor has it, and rounds answers.",
    ),
    click.option("--compile", is_flag=True, help="Let torch.compile fuse the blocks; starting takes longer."),
    click.option(
        "--bank-bytes", type=ByteSize(), default="1G", show_default=True, help="Memory for adapters on the device."
    ),
    click.option(
        "--host-bytes",
        type=ByteSize(),
        default="1G",
        show_default=True,
        help="Memory for adapters that are ready to be copied there; 0 for none.",
    ),
    click.option("--max-batch-size", type=int, default=32, show_default=True, help="Most images in a forward pass."),
    click.option(
        "--batch-timeout", type=float, default=0.002, show_default=True, help="Seconds to wait for batch-mates."
    ),
    click.option(
        "--max-body-bytes", type=int, default=10 * 2**20, show_default=True, help="Largest request; then 413."
    ),
    click.option("--max-pixels", type=int, default=50_000_000, show_default=True, help="Largest image; then 413."),
    click.option("--queue-limit", type=int, default=128, show_default=True, help="Most requests admitted; then 503."),
    click.option("--deadline", type=float, default=30.0, show_default=True, help="Seconds to answer in; then 504."),
    click.option("--drain", type=float, default=30.0, show_default=True, help="Seconds to finish in after SIGTERM."),
)
export_options = _option_group(
    click.option("--task", help="One task, folded into a graph of its own."),
    click.option("--tasks", help="Tasks for one graph with a bank, separated by commas."),
    click.option("--all", "every", is_flag=True, help="All tasks of the folder in one graph with a bank."),
    click.option("--output", type=click.Path(path_type=Path), help="The graph to write, FILE.onnx."),
    click.option(
        "--add-to", type=click.Path(path_type=Path), help="A graph with a bank, which gets --task; it stays as it is."
    ),
    click.option(
        "--input",
        "kind",
        type=click.Choice(["uint8", "float"]),
        default="uint8",
        show_default=True,
        help="RGB pixels (batch, H, W, 3), or normalised (batch, 3, H, W).",
    ),
    click.option("--logits", is_flag=True, help="Put out scores before the softmax, not probabilities."),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "fp16", "int8"]),
        default="fp32",
        show_default=True,
        help="Of weights and activations; fp16 is for GPUs, int8 needs --data.",
    ),
    click.option(
        "--data",
        multiple=True,
        metavar="[TASK=]DATA",
        help="Test images to verify on, as for eval; repeat for more tasks. int8 needs them.",
    ),
    click.option(
        "--max-drop",
        type=click.FloatRange(0, 100),
        default=0.5,
        show_default=True,
        help="Percentage points of accuracy that int8 may lose.",
    ),
    click.option("--force", is_flag=True, help="Write an int8 graph that loses more."),
)
bench_options = _option_group(
    click.option(
        "--only",
        multiple=True,
        type=click.Choice(["forward", "mixed", "engines", "http"]),
        help="One of the benchmarks; repeat for more.  [default: all]",
    ),
    click.option(
        "--backbone",
        "backbones",
        multiple=True,
        default=[BUNDLED, "vit_small_patch16_224"],
        show_default=True,
        help="timm name of a plain ViT, given random weights, or the bundled one; repeat for more.",
    ),
    click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Most rounds a comparison."),
    click.option(
        "--output",
        type=click.Path(path_type=Path, file_okay=False),
        default="benchmarks/results",
        show_default=True,
        help="Folder for results.json and tables.md.",
    ),
)


def resolve_device(name: str) -> str:
    """``auto`` resolved."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", name):
        return name
    if name != "auto":
        raise UsageError(f"--device {name} is not a device: use auto, cpu, cuda or cuda:N")
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def read_file(path: Path) -> bytes:
    """Its bytes; one that cannot be read is the user's mistake."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def data_by_task(data: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """``TASK=DATA``, or ``DATA`` alone for the only task; data may have a ``=`` after its ``?``."""
    sources = {}
    for item in data:
        task, equals, source = item.partition("=")
        named = bool(equals) and "?" not in task
        if not named and len(tasks) > 1:
            raise UsageError(f"--data {item} does not say for which task: --data TASK={item}")
        sources[task if named else tasks[0]] = source if named else item
    return sources
