"""The commands that fit adapters: ``train``, ``close-gates`` and ``calibrate``. Heavy imports live inside them."""

import json
from contextlib import ExitStack, closing
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
from gpt_serve.cli.training_options import cache_option, closing_options, reading_options, training_options
from gpt_serve.errors import UsageError

if TYPE_CHECKING:
    from gpt_serve.cli.terminal import Terminal
    from gpt_serve.model.backbone import Backbone
    from gpt_serve.train.closing.close import ClosingJob


@click.command()
@task_option
@click.option("--data", help=f"{DATA_KINDS}  [default: the task's name]")
@backbone_options
@training_options
@reading_options
@cache_option
@click.option("--close-gates", "closes", is_flag=True, help="Then close gates, as gpt-serve close-gates does.")
@click.option(
    "--instant/--no-instant",
    default=True,
    help="Publish what a new task starts from at once, where that is an answer already, then train on.  [--instant]",
)
@click.option("--nmi", is_flag=True, help="Record what prompts and patch tokens share after each epoch, for inspect.")
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
    adapters: Path,
    as_json: bool,
    recipe: str,
    **hyperparameters: Any,
) -> None:
    """Train an adapter and publish it; a running server picks it up."""
    from gpt_serve.specs import check_task_name

    check_task_name(task)
    from gpt_serve.cli.terminal import Terminal, echo_closing, echo_trained
    from gpt_serve.model.backbone import Backbone
    from gpt_serve.train.closing.close import ClosingJob
    from gpt_serve.train.data.datasets import find_benchmark
    from gpt_serve.train.distributed import join_world
    from gpt_serve.train.fit import train_adapter
    from gpt_serve.train.job import TrainingJob
    from gpt_serve.train.methods.prompts import find_method
    from gpt_serve.train.recipes.choice import choose_recipe

    published = find_benchmark(data or task)
    with ExitStack() as stack:
        world, device = stack.enter_context(join_world(resolve_device(device)))
        if closes and world.size > 1:
            raise UsageError("--close-gates takes one process: leave it out, and run gpt-serve close-gates afterwards")
        model = Backbone.load(backbone, checkpoint=checkpoint, input_size=input_size, pool=pool, device=device)
        settings, taken = choose_recipe(recipe, task, model, published, **hyperparameters)
        if closes and not find_method(settings.method).gated:
            raise UsageError(f"--close-gates: the method {settings.method} learns no gates: leave it out")
        if closes and settings.final_fit:
            raise UsageError("--close-gates decides by validation images, which a final fit trains on: --no-final-fit")
        if nmi and not find_method(settings.method).prompts:
            raise UsageError(f"--nmi: the method {settings.method} has no prompts: leave it out")
        job = TrainingJob(
            task, data or task, adapters, settings, resume, skip_unreadable, workers, nmi, instant, cache_bytes
        )
        terminal = Terminal(quiet=not world.leader)
        terminal.notice(taken)
        stack.callback(terminal.close)
        try:
            summary = train_adapter(model, job, terminal, world)
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
            again = ClosingJob(task, job.data, adapters, skip_unreadable=skip_unreadable, workers=workers)
            step = _close(model, again, terminal)
            summary |= step | {"closing": [step["closing"]]}
    if as_json:
        click.echo(json.dumps(summary))
    elif closes:
        echo_closing(step, adapters)


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

    job = ClosingJob(task, data, adapters, **options)
    model = Backbone.load(backbone, checkpoint=checkpoint, input_size=input_size, device=resolve_device(device))
    terminal = Terminal()
    try:
        step = _close(model, job, terminal)
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


def _close(backbone: "Backbone", job: "ClosingJob", terminal: "Terminal") -> dict[str, Any]:
    from gpt_serve.train.closing.close import close_gates

    try:
        return close_gates(backbone, job, terminal)
    except KeyboardInterrupt:
        terminal.close()
        terminal.notice(f"stopped while gates of {job.task!r} were closed: to begin anew, run gpt-serve close-gates")
        raise
