"""``gpt-serve keys``: tenants of a server and their keys."""

import json
from pathlib import Path
from typing import Any

import click

from gpt_serve.cli.options import json_option

keys_option = click.option(
    "--keys",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default="keys.json",
    show_default=True,
    help="File of keys; gpt-serve serve --keys FILE follows it without a restart.",
)


@click.group()
def keys() -> None:
    """Keys for a server: who may ask which tasks, and how much."""


@keys.command()
@click.argument("tenant")
@click.option("--task", "tasks", multiple=True, help="Pattern of tasks, such as flowers or acme-*; repeat for more.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Most answers a second: one an image and task.")
@click.option("--in-flight", type=click.IntRange(1), help="Most answers on their way at once.")
@keys_option
@json_option
def add(tenant: str, tasks: tuple[str, ...], path: Path, as_json: bool, **limits: Any) -> None:
    """Make a key for TENANT and print it; it is kept nowhere else.

    Without limits a new tenant may ask everything, and one that is there already keeps its limits.
    """
    from gpt_serve.serve.keyfile import add_key

    given = {name: value for name, value in limits.items() if value is not None} | ({"tasks": tasks} if tasks else {})
    key, added = add_key(path, tenant, **given)
    if as_json:
        click.echo(json.dumps({"key": key} | _shown(added)))
    else:
        click.echo(key)
        click.echo(f"{path}: key {added.keys[-1].id} of {added.name}; it is shown this once", err=True)


@keys.command("list")
@keys_option
@json_option
def list_keys(path: Path, as_json: bool) -> None:
    """List tenants, their limits and the ids of their keys."""
    from gpt_serve.cli.terminal import echo_table
    from gpt_serve.serve.keyfile import load_tenants

    shown = [_shown(tenant) for tenant in load_tenants(path).values()]
    if as_json:
        click.echo(json.dumps({"tenants": shown}))
        return
    rows = [
        [entry["tenant"], " ".join(entry["tasks"]), _limit(entry["rate"]), _limit(entry["in_flight"])]
        + [", ".join(f"{key['id']} ({key['created'][:10]})" for key in entry["keys"]) or "none"]
        for entry in shown
    ]
    echo_table(["tenant", "tasks", "requests/s", "in flight", "keys"], rows)


@keys.command()
@click.argument("name", metavar="KEY_ID|TENANT")
@keys_option
@json_option
def revoke(name: str, path: Path, as_json: bool) -> None:
    """Revoke one key by its id, or a tenant with all keys."""
    from gpt_serve.serve.keyfile import revoke

    ids = revoke(path, name)
    if as_json:
        click.echo(json.dumps({"revoked": ids}))
    else:
        click.echo(f"{path}: revoked {', '.join(ids) or 'a tenant without keys'}")


def _shown(tenant: Any) -> dict[str, Any]:
    """A tenant without the hashes of its keys."""
    keys = [{"id": key.id, "created": key.created} for key in tenant.keys]
    limits = {"rate": tenant.rate, "in_flight": tenant.in_flight}
    return {"tenant": tenant.name, "tasks": list(tenant.tasks), **limits, "keys": keys}


def _limit(value: float | None) -> str:
    return "no limit" if value is None else f"{value:g}"
