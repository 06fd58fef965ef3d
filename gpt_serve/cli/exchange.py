"""The commands that move an adapter: ``push`` and ``pull``. Heavy imports live inside them."""

import json
from pathlib import Path
from typing import Any

import click

from gpt_serve.cli.options import adapters_folder_option, json_option, task_option

address_argument = click.argument("address", metavar="ADDRESS")


@click.command()
@task_option
@address_argument
@adapters_folder_option
@json_option
def push(task: str, address: str, adapters: Path, as_json: bool) -> None:
    """Copy an adapter and its card from a folder to s3://bucket/prefix, gs://..., file:///... or hf://owner/repo.

    Servers that read adapters from there answer with it within --poll-seconds and a quarter.
    """
    from gpt_serve.adapters import exchange

    _echo(exchange.push(adapters, task, address), as_json)


@click.command()
@task_option
@address_argument
@adapters_folder_option
@json_option
def pull(task: str, address: str, adapters: Path, as_json: bool) -> None:
    """Copy an adapter and its card from ADDRESS into a folder; the digest that its publisher wrote must fit."""
    from gpt_serve.adapters import exchange

    _echo(exchange.pull(address, task, adapters), as_json)


def _echo(moved: dict[str, Any], as_json: bool) -> None:
    text = f"{moved['task']}: revision {moved['revision']} is in {moved['to']} ({len(moved['files'])} files)"
    click.echo(json.dumps(moved) if as_json else text)
