"""The command that searches hyperparameters: ``sweep``. Heavy imports live inside it."""

import json
from concurrent.futures import BrokenExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click

from gpt_serve.cli.options import DATA_KINDS, adapters_folder_option, backbone_options, json_option, task_option
from gpt_serve.cli.training_options import cache_option, reading_options, sweep_options
from gpt_serve.errors import UsageError


@click.command()
@task_option
@click.option("--data", help=f"{DATA_KINDS}  [default: the task's name]")
@backbone_options
@sweep_options
@reading_options
@cache_option
@adapters_folder_option
@json_option
def sweep(
    task: str,
    data: str | None,
    backbone: str,
    checkpoint: Path | None,
    input_size: int | None,
    device: str,
    pool: Any,
    samples: int | None,
    early_stop: bool,
    jobs: int | None,
    ray_address: str,
    resume: bool,
    skip_unreadable: bool,
    workers: int,
    cache_bytes: int,
    adapters: Path,
    as_json: bool,
    recipe: str,
    **hyperparameters: Any,
) -> None:
    """Search learning rate, gate prior and number of prompts on validation images, and publish the best adapter.

    Tries the grid of the lists given, the paper's where none are given, with Optuna.
    """
    from gpt_serve.specs import check_task_name

    check_task_name(task)
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {device}: trials share GPUs: use cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    try:
        from gpt_serve.train.sweep.sweep import make_axes, make_grid, run_sweep
    except ModuleNotFoundError as error:
        raise UsageError(f"sweep needs Optuna ({error}): pip install 'gpt-serve[sweep]'") from error
    from gpt_serve.cli.terminal import Terminal, echo_sweep, echo_trained
    from gpt_serve.train.data.datasets import find_benchmark
    from gpt_serve.train.job import TrainingJob
    from gpt_serve.train.loading import backbone_facts
    from gpt_serve.train.methods.prompts import find_method
    from gpt_serve.train.recipes.choice import choose_recipe
    from gpt_serve.train.recipes.recipe import Recipe
    from gpt_serve.train.sweep.report import report_table
    from gpt_serve.train.sweep.trial import Sweep
    from gpt_serve.train.workers import local_workers, ray_workers

    start = partial(local_workers, device) if ray_address == "local" else partial(ray_workers, ray_address, device)
    path = checkpoint and checkpoint.resolve()
    load = (("name", backbone), ("checkpoint", path), ("input_size", input_size), ("pool", pool), ("device", device))
    try:
        with start(1) as submit:
            facts = submit(backbone_facts, load).result()
    except BrokenExecutor as error:
        raise UsageError("the process that loads the backbone died: it may have run out of memory") from error
    given = {name: hyperparameters.pop(name) for name in ("lr", "gate_init", "prompts")}
    first = {name: values and values[0] for name, values in given.items()}
    published = find_benchmark(data or task)

    def choose(rate: float | None) -> tuple[Recipe, str]:
        return choose_recipe(recipe, task, facts, published, **first | {"lr": rate}, **hyperparameters)

    settings, taken = choose(first["lr"])
    if find_method(settings.method).full:
        raise UsageError("--method full: a sweep publishes an adapter: choose another method")
    axes = make_axes(settings, given)
    recipes = make_grid(lambda rate: choose(rate)[0], axes, samples)
    source = data or task
    source = str(Path(source).resolve()) if Path(source).exists() else source
    job = TrainingJob(
        task, source, adapters.resolve(), settings, resume, skip_unreadable, workers, cache_bytes=cache_bytes
    )
    with closing(Terminal()) as terminal:
        terminal.notice(taken)
        shown = "; ".join(f"{name.replace('_', ' ')} {', '.join(map('{:g}'.format, axes[name]))}" for name in axes)
        terminal.notice(f"{len(recipes)} trial{'' if len(recipes) == 1 else 's'}: {shown}")
        fixed = tuple((name, tuple(values)) for name, values in axes.items())
        report = run_sweep(Sweep(job, load, facts, fixed, tuple(recipes), early_stop, jobs), start, terminal)
    if as_json:
        click.echo(json.dumps(report))
    else:
        echo_trained(report, adapters)
        echo_sweep(*report_table(report["sweep"], report["recipe"]["select"]), adapters / task)
