"""The options that commands share."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from gpt_serve.errors import ImageError, UsageError
from gpt_serve.model.catalog import DEFAULT_BACKBONE
from gpt_serve.specs import TASK_PATTERN


class ByteSize(click.ParamType[int]):
    """A number of bytes: ``1048576``, ``1024K``, ``1M``, ``0.5G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:I?B)?", str(value).strip().upper())
        if match is None:
            self.fail(f"{value!r} is not a size: give bytes, or a number with K, M, G or T, such as 512M", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


class Adapters(click.Path):
    """A folder of adapters as a `Path` or, where ``elsewhere`` is allowed, the address of a store as it is."""

    def __init__(self, *, elsewhere: bool) -> None:
        super().__init__(file_okay=False, path_type=Path)
        self.elsewhere = elsewhere

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The `Path`, or the address."""
        if "://" not in str(value):
            return super().convert(value, param, ctx)
        if not self.elsewhere:
            self.fail(f"{value} is not a folder: name one, and use gpt-serve push and pull", param, ctx)
        return value


def option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in this order."""

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
    type=Adapters(elsewhere=True),
    default="adapters",
    show_default=True,
    help="Folder of adapters, or s3://bucket/prefix, gs://bucket/prefix, file:///path, hf://owner/repo.",
)
adapters_folder_option = click.option(
    "--adapters",
    type=Adapters(elsewhere=False),
    default="adapters",
    show_default=True,
    help="Folder of adapters.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
weights_options = option_group(
    click.option(
        "--backbone",
        default=DEFAULT_BACKBONE,
        show_default=True,
        help="Bundled backbone or timm name of a plain ViT.",
    ),
    click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights file: MAE, MoCo v3 or timm."),
    click.option("--input-size", type=click.IntRange(1, 4096), help="Side of the input in pixels."),
)
backbone_options = option_group(weights_options, device_option)
serving_options = option_group(
    click.option(
        "--poll-seconds",
        type=float,
        default=30.0,
        show_default=True,
        help="How often a store elsewhere is listed; a folder is read at each request.",
    ),
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
    click.option(
        "--trunk-cache-bytes",
        type=ByteSize(),
        default="0",
        show_default=True,
        help="Memory on the device for what blocks that tasks share made of images asked about again; 0 for none.",
    ),
    click.option("--max-batch-size", type=int, default=32, show_default=True, help="Most images in a forward pass."),
    click.option(
        "--batch-timeout", type=float, default=0.002, show_default=True, help="Seconds to wait for batch-mates."
    ),
    click.option(
        "--max-body-bytes", type=int, default=10 * 2**20, show_default=True, help="Largest request; then 413."
    ),
    click.option("--max-pixels", type=int, default=50_000_000, show_default=True, help="Largest image; then 413."),
    click.option("--queue-limit", type=int, default=128, show_default=True, help="Most images admitted; then 503."),
    click.option("--max-connections", type=int, default=1024, show_default=True, help="Most connections open."),
    click.option("--deadline", type=float, default=30.0, show_default=True, help="Seconds to answer in; then 504."),
    click.option(
        "--keys",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File of tenants and their keys, made by gpt-serve keys; followed without a restart.",
    ),
    click.option("--access-log", metavar="FILE|-", help="Log each request as a line of JSON; - for standard output."),
    click.option("--drain", type=float, default=30.0, show_default=True, help="Seconds to finish in after SIGTERM."),
    click.option(
        "--load-timeout", type=float, default=900.0, show_default=True, help="Seconds to load the backbone in."
    ),
)
export_options = option_group(
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
BENCHMARKS = ["peers", "mixed", "tasks", "prompts", "engines", "bank", "cold", "overhead", "http", "soak"]
bench_options = option_group(
    click.option(
        "--only",
        multiple=True,
        type=click.Choice(BENCHMARKS),
        help="One of the benchmarks; repeat for more.  [default: all but soak]",
    ),
    click.option(
        "--backbone",
        "backbones",
        multiple=True,
        help="A bundled backbone, or a timm name of a plain ViT, given random weights; repeat for more.  [default: "
        "each benchmark's own]",
    ),
    click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Most rounds a comparison."),
    click.option(
        "--seconds",
        type=click.FloatRange(0),
        default=10,
        show_default=True,
        help="A comparison ends after these and 3 rounds.",
    ),
    click.option(
        "--output",
        type=click.Path(path_type=Path, file_okay=False),
        default="benchmarks/results",
        show_default=True,
        help="Folder for results.json, tables.md and plots; what was measured again replaces itself there.",
    ),
)


def half_of_the_cores() -> int:
    """Of those that this process may use, and at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


def resolve_device(name: str) -> str:
    """``auto`` resolved."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", name):
        return name
    if name != "auto":
        raise UsageError(f"--device {name} is not a device: use auto, cpu, cuda or cuda:N")
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_devices(names: str) -> str:
    """Several devices, separated by commas; ``cuda`` is all GPUs that this process sees."""
    devices = [resolve_device(name.strip()) for name in names.split(",")]
    if devices != ["cuda"]:
        return ",".join(devices)
    import torch

    return ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count())) or "cuda"


def image_bytes(path: Path) -> bytes:
    """An image file in a form that the decoder takes.

    Raises:
        ImageError: whatever is wrong with it, the disk included.
    """
    from gpt_serve.images.convert import read_image

    try:
        return read_image(path)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error


def data_by_task(data: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """``TASK=DATA``, or ``DATA`` alone for the only task.

    What stands before a ``=`` may also be the beginning of a path, or of a name with options: it is a task if it is
    one of ``tasks``, or if there is no such path and it could be one.
    """
    sources = {}
    for item in data:
        task, equals, source = item.partition("=")
        named = task in tasks or bool(TASK_PATTERN.fullmatch(task) and not Path(item).exists())
        named = named and bool(equals)
        if not named and len(tasks) > 1:
            raise UsageError(f"--data {item} does not say for which task: --data TASK={item}")
        sources[task if named else tasks[0]] = source if named else item
    return sources
