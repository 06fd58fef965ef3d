"""The command line: its commands, and how it ends. Heavy imports live inside the commands."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gpt_serve import __version__
from gpt_serve.cli.backbones import backbones
from gpt_serve.cli.deploy import deploy
from gpt_serve.cli.exchange import pull, push
from gpt_serve.cli.exits import EXIT_INTERRUPTED, EXIT_MISTAKE, escape_what_cannot_be_shown, say
from gpt_serve.cli.insight import inspect, reconstruct
from gpt_serve.cli.keys import keys
from gpt_serve.cli.options import (
    adapters_option,
    backbone_options,
    bench_options,
    data_by_task,
    device_option,
    export_options,
    half_of_the_cores,
    json_option,
    resolve_device,
    resolve_devices,
    serving_options,
    weights_options,
)
from gpt_serve.cli.predict import evaluate, predict
from gpt_serve.cli.sweep import sweep
from gpt_serve.cli.train import calibrate, close_gates, train
from gpt_serve.engine.malloc import reuse_freed_memory
from gpt_serve.errors import GPTServeError, UsageError


class Mistake(click.ClickException):
    """Shown as one line on stderr."""

    exit_code = EXIT_MISTAKE

    def show(self, file: Any = None) -> None:
        say(self.message)


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn the package's errors, and click's own of several lines, into a `Mistake`."""
    try:
        yield
    except GPTServeError as error:
        raise Mistake(str(error)) from error
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "gpt-serve"
        raise Mistake(f"{error.format_message()} Try '{command} --help'.") from error


class Group(click.Group):
    """Ends a user's mistake with one line on stderr and an exit code."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        escape_what_cannot_be_shown()
        with _mistakes():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _mistakes():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpt-serve")
def main() -> None:
    """Serve many vision tasks from one frozen Vision Transformer with gated prompt adapters."""
    # Idle OpenMP threads that spin slow everything else on a shared machine; read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    reuse_freed_memory()


main.add_command(evaluate)
main.add_command(predict)
main.add_command(train)
main.add_command(sweep)
main.add_command(close_gates)
main.add_command(calibrate)
main.add_command(inspect)
main.add_command(reconstruct)
main.add_command(deploy)
main.add_command(push)
main.add_command(pull)
main.add_command(keys)
main.add_command(backbones)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option(
    "--replicas",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Workers on the CPU; of GPUs, each has one.",
)
@click.option(
    "--http-workers",
    type=click.IntRange(1, 256),
    default=half_of_the_cores,
    show_default="half of the cores",
    help="Processes that answer HTTP.",
)
@click.option(
    "--trusted-proxies",
    metavar="ADDRESSES",
    default="",
    help="Proxies whose X-Forwarded-For tells who asks; networks too, separated by commas; * for all.",
)
@adapters_option
@backbone_options
@serving_options
def serve(device: str, **options: Any) -> None:
    """Answer HTTP requests; watches the adapter folder."""
    from gpt_serve.serve import ServeConfig, run

    sys.exit(run(ServeConfig(device=resolve_devices(device), **options)))


@main.command()
@export_options
@weights_options
@adapters_option
@json_option
def export(
    task: str | None,
    tasks: str | None,
    every: bool,
    output: Path | None,
    add_to: Path | None,
    kind: Any,
    data: tuple[str, ...],
    adapters: Path | str,
    as_json: bool,
    backbone: str,
    checkpoint: Path | None,
    input_size: int | None,
    **options: Any,
) -> None:
    """Write a verified ONNX graph of one task, or of one backbone for many."""
    from gpt_serve.adapters.store import AdapterStore

    if [task is not None, tasks is not None, every].count(True) != 1:
        raise UsageError("name what to export: one of --task NAME, --tasks A,B,C and --all")
    if (output is None) == (add_to is None) or (add_to is not None and task is None):
        raise UsageError("name where to: --output FILE.onnx, or --add-to GRAPH.onnx with --task")
    store = AdapterStore(adapters)
    names = store.tasks() if every else [name.strip() for name in (tasks or task or "").split(",")]
    if not names:
        raise UsageError(f"no adapters in {adapters}: train one, or name another place with --adapters")
    for name in names:
        store.load(name)
    from gpt_serve.cli.terminal import echo_exported
    from gpt_serve.export import ExportOptions, add_task, export_task, export_tasks
    from gpt_serve.model.backbone import Backbone

    chosen = ExportOptions(input=kind, data=data_by_task(data, names), **options)
    model = Backbone.load(backbone, checkpoint=checkpoint, input_size=input_size)
    if add_to is not None:
        result = add_task(model, store, names[0], add_to, chosen)
    elif output is not None and task is not None:
        result = export_task(model, store, task, output, chosen)
    elif output is not None:
        result = export_tasks(model, store, names, output, chosen)
    if as_json:
        click.echo(json.dumps(result))
    else:
        echo_exported(result)


@main.command()
@adapters_option
@json_option
def tasks(adapters: Path | str, as_json: bool) -> None:
    """List adapters."""
    from gpt_serve.adapters.store import AdapterStore
    from gpt_serve.cli.terminal import echo_tasks

    described = AdapterStore(adapters).describe()
    if not described and not as_json:
        raise UsageError(f"no adapters in {adapters}: train one, or name another place with --adapters")
    if as_json:
        click.echo(json.dumps({"tasks": [item.to_dict() for item in described]}))
    else:
        echo_tasks(described)


@main.command()
@bench_options
@device_option
def bench(
    only: tuple[str, ...], backbones: tuple[str, ...], device: str, repeats: int, seconds: float, output: Path
) -> None:
    """Measure the engine and the server against what they are built on, and against other ways to serve many tasks."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server under test is ended too
    from gpt_serve.bench import run_benchmarks
    from gpt_serve.bench.plots import draw
    from gpt_serve.bench.report import Table, merged, read, save, summary
    from gpt_serve.bench.timing import Plan
    from gpt_serve.cli.terminal import echo_table

    def show(table: Table) -> None:
        click.echo(f"\n{table.title}")
        echo_table(table.header, table.rows)

    records = read(output)
    save(output, records)  # a folder that cannot be written to is found before the measurements
    plan = Plan(repeats, comparison_seconds=seconds)
    for record in run_benchmarks(
        only, backbones, resolve_device(device), plan, lambda line: click.echo(line, err=True)
    ):
        records = merged(records, record)
        save(output, records)  # what was measured stays if a later benchmark fails
        show(record.table())
    draw(records, output)
    show(summary(records))
