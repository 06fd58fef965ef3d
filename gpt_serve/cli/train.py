"""The commands that fit adapters: ``train``, ``close-gates`` and ``calibrate``. Heavy imports live inside them."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt_serve.cli.options import (
    DATA_KINDS,
    adapters_folder_option,
    backbone_options,
    data_option,
    json_option,
    resolve_device,
    task_option,
)
from gpt_serve.cli.training_options import (
    cache_option,
    closing_options,
    mask_options,
    ray_option,
    reading_options,
    training_options,
)
from gpt_serve.errors import UsageError

if TYPE_CHECKING:
    from gpt_serve.cli.terminal import Terminal
    from gpt_serve.train.closing.close import ClosingJob
    from gpt_serve.train.loading import LoadArguments
    from gpt_serve.train.places import Place


@click.command()
@task_option
@click.option("--data", help=f"{DATA_KINDS}  [default: the task's name]")
@backbone_options
@training_options
@mask_options
@reading_options
@cache_option
@click.option("--close-gates", "closes", is_flag=True, help="Then close gates, as gpt-serve close-gates does.")
@click.option(
    "--instant/--no-instant",
    default=True,
    help="Publish what a new task starts from at once, where that is an answer already, then train on.  [--instant]",
)
@click.option("--nmi", is_flag=True, help="Record what prompts and patch tokens share after each epoch, for inspect.")
@ray_option
@adapters_folder_option
@json_option
def train(
    task: str,
    data: str | None,
    backbone: str,
    checkpoint: Path | None,
    input_size: int | None,
    device: str,
    pool: Any,
    resume: bool,
    skip_unreadable: bool,
    workers: int,
    cache_bytes: int,
    closes: bool,
    instant: bool,
    nmi: bool,
    ray_address: str,
    adapters: Path,
    as_json: bool,
    recipe: str,
    kind: str | None,
    ignore: tuple[int, ...] | None,
    head: str | None,
    geometry: str | None,
    window: float | None,
    **hyperparameters: Any,
) -> None:
    """Train an adapter and publish it; a running server picks it up."""
    from gpt_serve.specs import check_task_name

    check_task_name(task)
    from gpt_serve.cli.terminal import Terminal, echo_closing, echo_trained
    from gpt_serve.train.closing.close import ClosingJob
    from gpt_serve.train.job import TrainingJob
    from gpt_serve.train.methods.prompts import find_method

    masks = {"ignore": ignore, "head": head, "geometry": geometry, "window": window}
    choose = _chooser(kind, task, data or task, masks, closes)
    source, folder = data or task, adapters
    if ray_address != "local":  # on another machine, what is relative here is not
        source = str(Path(source).resolve()) if Path(source).exists() else source
        folder, checkpoint = adapters.resolve(), checkpoint and checkpoint.resolve()
    load = (("name", backbone), ("checkpoint", checkpoint), ("input_size", input_size))
    with ExitStack() as stack:
        place = stack.enter_context(_place(ray_address, (*load, ("pool", pool), ("device", device)), closes))
        settings, taken = choose(place.backbone, recipe, **hyperparameters)
        if closes and not find_method(settings.method).gated:
            raise UsageError(f"--close-gates: the method {settings.method} learns no gates: leave it out")
        if closes and settings.final_fit:
            raise UsageError("--close-gates decides by validation images, which a final fit trains on: --no-final-fit")
        if nmi and not find_method(settings.method).prompts:
            raise UsageError(f"--nmi: the method {settings.method} has no prompts: leave it out")
        job = TrainingJob(task, source, folder, settings, resume, skip_unreadable, workers, nmi, instant, cache_bytes)
        terminal = Terminal(quiet=not place.leader)
        terminal.notice(taken)
        stack.callback(terminal.close)
        try:
            summary = place.train(job, terminal)
        except KeyboardInterrupt:
            terminal.close()
            if terminal.epochs:
                terminal.notice(f"stopped after epoch {terminal.epochs}: repeat the command with --resume to continue")
            raise
        if summary is None:
            return
        if not as_json:
            echo_trained(summary, adapters)
        if closes:
            again = ClosingJob(task, source, folder, skip_unreadable=skip_unreadable, workers=workers)
            step = _close(place, again, terminal)
            summary |= step | {"closing": [step["closing"]]}
    if as_json:
        click.echo(json.dumps(summary))
    elif closes:
        echo_closing(step, adapters)


def _chooser(kind: str | None, task: str, data: str, masks: dict[str, Any], closes: bool) -> Callable[..., Any]:
    """What chooses the recipe, for the kind of task that is named or that the data are for.

    Args:
        masks: options for segmentation alone; None for those that are not given.

    Raises:
        UsageError: one of these is given for classification, or ``closes`` for segmentation.
    """
    from gpt_serve.train.data.datasets import find_benchmark
    from gpt_serve.train.masks.recipe import choose_mask_recipe
    from gpt_serve.train.masks.sources import find_kind
    from gpt_serve.train.recipes.choice import choose_recipe

    if (kind or find_kind(data)) == "segmentation":
        if closes:
            raise UsageError("--close-gates is for classification: leave it out")
        return lambda backbone, name, **given: choose_mask_recipe(name, **given, **masks)
    if given := [name for name, value in masks.items() if value is not None]:
        raise UsageError(f"--{given[0]} is for segmentation, and {data} is for classification: leave it out")
    published = find_benchmark(data)
    return lambda backbone, name, **given: choose_recipe(name, task, backbone, published, **given)


@contextmanager
def _place(ray_address: str, load: "LoadArguments", closes: bool) -> "Iterator[Place]":
    """Where the command trains: here, perhaps as one of several processes, or on a Ray cluster."""
    from gpt_serve.model.backbone import Backbone
    from gpt_serve.train.distributed import join_world
    from gpt_serve.train.places import Here, on_ray

    arguments = dict(load)
    if ray_address != "local":
        with on_ray(ray_address, load) as place:
            yield place
        return
    with join_world(resolve_device(arguments["device"])) as (world, device):
        if closes and world.size > 1:
            raise UsageError("--close-gates takes one process: leave it out, and run gpt-serve close-gates afterwards")
        yield Here(Backbone.load(**arguments | {"device": device}), world)


@click.command("close-gates")
@task_option
@data_option
@backbone_options
@closing_options
@reading_options
@adapters_folder_option
@json_option
def close_gates(
    task: str,
    data: str,
    backbone: str,
    checkpoint: Path | None,
    input_size: int | None,
    device: str,
    adapters: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Close the gates that an adapter can do without: it is served faster.

    Fine-tunes with gates fixed at 0 on the images that the adapter was trained on. Validation images decide; the
    adapter is replaced only when its validation accuracy is not worse than --tolerance allows.
    """
    from gpt_serve.adapters.store import AdapterStore

    AdapterStore(adapters).load(task)  # an unknown or broken one is reported before the backbone is loaded
    from gpt_serve.cli.terminal import Terminal, echo_closing
    from gpt_serve.model.backbone import Backbone
    from gpt_serve.train.closing.close import ClosingJob
    from gpt_serve.train.distributed import World
    from gpt_serve.train.places import Here

    job = ClosingJob(task, data, adapters, **options)
    model = Backbone.load(backbone, checkpoint=checkpoint, input_size=input_size, device=resolve_device(device))
    terminal = Terminal()
    try:
        step = _close(Here(model, World()), job, terminal)
    finally:
        terminal.close()
    if as_json:
        click.echo(json.dumps(step))
    else:
        echo_closing(step, adapters)


@click.command()
@task_option
@data_option
@backbone_options
@reading_options
@adapters_folder_option
@json_option
def calibrate(
    task: str,
    data: str,
    backbone: str,
    checkpoint: Path | None,
    input_size: int | None,
    device: str,
    adapters: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Let an adapter's probabilities mean what they say, as training does at its end.

    For an adapter of an earlier version. Takes the images that it was trained on: validation images decide. Its answers
    keep their order.
    """
    from gpt_serve.adapters.store import AdapterStore

    AdapterStore(adapters).load(task)  # an unknown or broken one is reported before the backbone is loaded
    from gpt_serve.cli.terminal import Terminal, echo_calibrated
    from gpt_serve.model.backbone import Backbone
    from gpt_serve.train.published import PublishedJob, calibrate_published

    job = PublishedJob(task, data, adapters, **options)
    model = Backbone.load(backbone, checkpoint=checkpoint, input_size=input_size, device=resolve_device(device))
    with closing(Terminal()) as terminal:
        summary = calibrate_published(model, job, terminal)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        echo_calibrated(summary, adapters)


def _close(place: "Place", job: "ClosingJob", terminal: "Terminal") -> dict[str, Any]:
    try:
        return place.close(job, terminal)
    except KeyboardInterrupt:
        terminal.close()
        terminal.notice(f"stopped while gates of {job.task!r} were closed: to begin anew, run gpt-serve close-gates")
        raise
