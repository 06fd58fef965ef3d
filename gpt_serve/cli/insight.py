"""The commands that look inside: ``inspect`` and ``reconstruct``. Heavy imports live inside them."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt_serve.cli.options import (
    adapters_option,
    backbone_options,
    image_bytes,
    json_option,
    resolve_device,
    task_option,
)
from gpt_serve.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gpt_serve.adapters.adapter import Adapter
    from gpt_serve.model.backbone import Backbone
    from gpt_serve.specs import Preprocess

NMI_COLUMNS = 6
_image = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@task_option
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="PNG to write.  [default: TASK-gates.png]"
)
@click.option("--image", type=_image, help="Also show where the pooled tokens look: TASK-attention.png beside --plot.")
@click.option("--heads", is_flag=True, help="With --image, a map for each head instead of their average.")
@click.option("--nmi", is_flag=True, help="Also show what train --nmi has recorded: TASK-nmi.png beside --plot.")
@backbone_options
@adapters_option
@json_option
def inspect(
    task: str,
    plot: Path | None,
    image: Path | None,
    heads: bool,
    nmi: bool,
    adapters: Path | str,
    as_json: bool,
    **backbone: Any,
) -> None:
    """Gates, temperatures and selection ratio of an adapter, as a table and a plot.

    With --image also its attention on an image in an early, a middle and the last block, with the adapter and
    without; with --nmi also the mutual information between prompts and patch tokens along training.
    """
    if heads and image is None:
        raise UsageError("--heads is about attention maps: name an --image too")
    path = plot or Path(f"{task}-gates.png")
    beside = {"--nmi": path.with_name(f"{task}-nmi.png"), "--image": path.with_name(f"{task}-attention.png")}
    for flag, wanted in (("--nmi", nmi), ("--image", image is not None)):
        if wanted and beside[flag] == path:
            raise UsageError(f"--plot {path}: that is where {flag} puts its plot: name another file")
    from dataclasses import asdict

    from gpt_serve.adapters.store import AdapterStore
    from gpt_serve.insight.inspect import inspect_adapter, plot_inspection
    from gpt_serve.train.card import block_table

    stored = AdapterStore(adapters).load(task)
    inspection = inspect_adapter(stored.adapter)
    lines = [f"{task}: {stored.adapter.method}, {stored.adapter.prompts} prompts, revision {stored.revision}"]
    lines += [*block_table(inspection), f"plot: {path}"]
    answer = {"task": task, "revision": stored.revision, **asdict(inspection), "plot": str(path)}
    if nmi:
        answer["nmi"], more = _show_nmi(stored.adapter, beside["--nmi"])
        lines += more
    if image is not None:
        model = _load(stored.adapter, **backbone)
        answer["attention"], more = _show_attention(stored.adapter, model, image, beside["--image"], heads=heads)
        lines += more
    with _writing(path):
        plot_inspection(inspection, f"{task} ({stored.adapter.method})", path)
    click.echo(json.dumps(answer) if as_json else "\n".join(lines))


@click.command()
@click.option("--image", type=_image, required=True, help="Image to reconstruct.")
@click.option("--task", help="Reconstruct with this adapter too.")
@click.option(
    "--block",
    "blocks",
    type=click.IntRange(1),
    multiple=True,
    help="Block whose tokens are given, from 1; repeat for more.  [an early, a middle and the last one]",
)
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True, help="Of the fit, for each block.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the network and its noise."
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The figure to write, FILE.png."
)
@backbone_options
@adapters_option
@json_option
def reconstruct(
    image: Path,
    task: str | None,
    blocks: tuple[int, ...],
    steps: int,
    seed: int,
    output: Path,
    adapters: Path | str,
    as_json: bool,
    **backbone: Any,
) -> None:
    """Reconstruct an image from the tokens of a block by Deep Image Prior.

    It shows what the block still knows: an untrained network is fitted until its image's tokens are those of --image.
    Prints PSNR and SSIM.
    """
    from gpt_serve.adapters.store import AdapterStore

    adapter = None if task is None else AdapterStore(adapters).load(task).adapter
    from gpt_serve.cli.terminal import Terminal, echo_table
    from gpt_serve.insight import reconstruct as dip
    from gpt_serve.insight.attention import adapter_rows, shown_blocks

    dip.require_metrics()
    model = _load(adapter, **backbone)
    depth = model.spec.depth
    if max(blocks, default=1) > depth:
        raise UsageError(f"--block {max(blocks)}: {model.name} has blocks 1 to {depth}")
    numbers = blocks or shown_blocks(depth)
    preprocess = model.spec.preprocess if adapter is None else adapter.preprocess
    pixels = _pixels(image, preprocess) / 255
    fits = {"without adapter": None} | ({} if adapter is None else {f"with {adapter.task}": adapter})
    rows: dict[str, list[dip.Reconstruction]] = {name: [] for name in fits}

    def write() -> None:
        with _writing(output):
            dip.plot_reconstructions(pixels, rows, output)

    write()  # a file that cannot be written is known before minutes are spent
    with closing(Terminal()) as terminal:
        for name, number in product(fits, numbers):
            tick = terminal.scanning(steps, f"block {number} {name}", "step")
            batch = adapter_rows(model, fits[name])
            result = dip.reconstruct(model, pixels, preprocess, batch, number, steps=steps, seed=seed, on_step=tick)
            rows[name].append(result)
            write()
    results = [(name, result) for name in rows for result in rows[name]]
    if as_json:
        found = [result.to_dict() | {"task": task if fits[name] else None} for name, result in results]
        click.echo(json.dumps({"image": str(image), "steps": steps, "blocks": found, "plot": str(output)}))
        return
    echo_table(
        ["block", "", "error", "PSNR", "SSIM"],
        [[str(one.block), name, f"{one.error:.1e}", f"{one.psnr:.1f} dB", f"{one.ssim:.3f}"] for name, one in results],
    )
    click.echo(f"plot: {output}")


def _load(adapter: "Adapter | None", *, device: str, backbone: str, **options: Any) -> "Backbone":
    """The backbone, which must be the adapter's."""
    from gpt_serve.model.backbone import Backbone

    model = Backbone.load(backbone, device=resolve_device(device), **options)
    if adapter is not None:
        adapter.check_backbone(model.spec)
    return model


def _pixels(path: Path, preprocess: "Preprocess") -> "Tensor":
    """The image as the network sees it: uint8 (3, H, W)."""
    from gpt_serve.errors import ImageError
    from gpt_serve.images.decode import LOCAL_LIMITS, decode
    from gpt_serve.images.preprocess import preprocess_image

    try:
        return preprocess_image(decode(image_bytes(path), LOCAL_LIMITS, exif=preprocess.exif), preprocess)
    except ImageError as error:
        raise UsageError(f"{path}: {error}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Trouble with a figure's file as one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"the plot cannot be written to {path}: {error.strerror}") from error


def _show_nmi(adapter: "Adapter", path: Path) -> tuple[dict[str, Any], list[str]]:
    """Plot the curves; what ``--json`` has of them, and a Markdown table with a row per block and a few epochs."""
    from gpt_serve.train.nmi import plot_nmi, recorded_nmi

    nmi = recorded_nmi(adapter)
    with _writing(path):
        plot_nmi(nmi, f"{adapter.task} ({adapter.method})", path)
    last = len(nmi) - 1
    shown = sorted({round(part * last / (NMI_COLUMNS - 1)) for part in range(NMI_COLUMNS)})
    table = ["", f"| NMI of block | {' | '.join(f'epoch {epoch + 1}' for epoch in shown)} |"]
    table.append("|---" * (len(shown) + 1) + "|")
    for number, values in enumerate(nmi.T[:, shown].tolist(), start=1):
        table.append(f"| {number} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return {"epochs": nmi.tolist(), "plot": str(path)}, [*table, f"NMI: {path}"]


def _show_attention(
    adapter: "Adapter", model: "Backbone", image: Path, path: Path, *, heads: bool
) -> tuple[dict[str, Any], list[str]]:
    """Plot the maps; what ``--json`` has of them, and a Markdown table with a row per block."""
    from gpt_serve.insight.attention import adapter_rows, attention_maps, embed_pixels, plot_attention, shown_blocks

    pixels = _pixels(image, adapter.preprocess)
    tokens = embed_pixels(model, pixels[None], adapter.preprocess)
    bare, given = (attention_maps(model, tokens, adapter_rows(model, which)) for which in (None, adapter))
    whose = "the CLS token" if adapter.pool == "cls" else "the pooled tokens, on average"
    blocks = shown_blocks(model.spec.depth)
    with _writing(path):
        rows = {"without adapter": bare, f"with {adapter.task}": given}
        plot_attention(pixels, rows, blocks, f"attention of {whose}", path, heads=heads)
    table = ["", "| block | attention on prompts | entropy with | entropy without |", "|---|---|---|---|"]
    for number, values in enumerate(zip(given.on_prompts, given.entropy, bare.entropy, strict=True), start=1):
        table.append(f"| {number} | {values[0]:.4f} | {values[1]:.3f} | {values[2]:.3f} |")
    answer = {
        "image": str(image),
        "query": adapter.pool,
        "blocks": blocks,
        "on_prompts": given.on_prompts,
        "entropy": given.entropy,
        "entropy_without": bare.entropy,
        "plot": str(path),
    }
    return answer, [*table, f"attention: {path}"]
