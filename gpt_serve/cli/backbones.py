"""``gpt-serve backbones``: what can be named with ``--backbone``."""

import json

import click

from gpt_serve.cli.options import json_option
from gpt_serve.model.recommended import RECOMMENDED, Recommended


@click.command()
@json_option
def backbones(as_json: bool) -> None:
    """List recommended backbones. Any other Vision Transformer of timm works by its name, too."""
    if as_json:
        click.echo(json.dumps({"backbones": [entry.to_dict() for entry in RECOMMENDED]}))
        return
    heads = ("backbone", "where", "M", "MB", "input", "pooling", "licence", "measured", "about")
    rows = [heads, *map(_cells, RECOMMENDED)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo("M: million parameters; MB: of weights; measured: linear discriminant analysis, % right.", err=True)


def _cells(entry: Recommended) -> tuple[str, ...]:
    measured = ", ".join(f"{data} {value:.1f}" for data, value in entry.measured.items())
    return (
        entry.name,
        "bundled" if entry.bundled else "hub",
        f"{entry.parameters:.0f}",
        str(entry.megabytes),
        str(entry.input_size),
        entry.pool,
        entry.licence,
        measured or "not here",
        entry.about,
    )
