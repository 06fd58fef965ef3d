"""The command ``deploy``. Heavy imports live inside it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from gpt_serve.cli.options import adapters_option, backbone_options, resolve_device, serving_options
from gpt_serve.errors import UsageError


@click.command()
@click.option("--local", is_flag=True, help="Start Ray on this machine alone; ends with Ctrl-C or SIGTERM.")
@click.option("--address", default="auto", show_default=True, help="Of the Ray cluster; auto: the one of this machine.")
@click.option(
    "--yaml",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Deploy nothing, write serve.yaml (serve deploy) and rayservice.yaml (KubeRay) to this folder.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="TCP port.")
@click.option("--min-replicas", type=int, default=1, show_default=True, help="Each holds the backbone.")
@click.option("--max-replicas", type=int, default=1, show_default=True, help="Ray adds some while requests wait.")
@click.option("--fronts", type=int, default=1, show_default=True, help="Actors on the head node that answer HTTP.")
@click.option("--cpus", type=float, default=1.0, show_default=True, help="Cores of a replica.")
@click.option("--gpus", type=float, default=0.0, show_default=True, help="GPUs of a replica; 0.5 lets two share one.")
@adapters_option
@backbone_options
@serving_options
def deploy(
    local: bool,
    address: str,
    folder: Path | None,
    min_replicas: int,
    max_replicas: int,
    fronts: int,
    cpus: float,
    gpus: float,
    adapters: Path | str,
    device: str,
    **options: Any,
) -> None:
    """Serve on a Ray cluster: the same interface as serve, on as many machines as it takes."""
    if any(find_spec(name) is None for name in ("ray", "yaml")):
        raise UsageError("deploy needs Ray: pip install 'gpt-serve[ray]'")
    try:
        from gpt_serve.cluster.app import ClusterConfig
        from gpt_serve.cluster.manifest import write
        from gpt_serve.cluster.run import deploy as run
    except ImportError as error:  # Ray without what Ray Serve needs
        raise UsageError(f"deploy needs Ray Serve ({error.name} is missing): pip install 'gpt-serve[ray]'") from error
    from gpt_serve.serve import ServeConfig

    device = resolve_device("cuda" if device == "auto" and gpus else "cpu" if device == "auto" else device)
    # Actors work in folders of their own.
    options |= {name: path.resolve() for name in ("checkpoint", "keys") if (path := options.get(name)) is not None}
    place = adapters.resolve() if isinstance(adapters, Path) else adapters
    cluster = ClusterConfig(min_replicas, max_replicas, fronts, cpus, gpus)
    config = ServeConfig(device=device, adapters=place, **options)
    if folder is not None:
        click.echo("\n".join(map(str, write(folder, config, cluster))))
        return
    run(config, cluster, None if local else address, lambda text: click.echo(text, err=True))
