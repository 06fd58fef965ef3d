"""The application of Ray Serve: fronts that answer HTTP, and replicas that compute."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from gpt_serve.cluster.front import build_front
from gpt_serve.cluster.replica import EngineReplica
from gpt_serve.errors import UsageError
from gpt_serve.serve.config import ServeConfig

NAME = "gpt-serve"
ENGINE, FRONT = "engine", "front"
HEALTH_SECONDS = 5.0
PROXIES = "HeadOnly"  # where the fronts are, for the same reason
HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class ClusterConfig:
    """What a cluster can be told beside a `ServeConfig`.

    Attributes:
        min_replicas: never fewer; each loads the backbone.
        max_replicas: never more.
        fronts: actors that answer HTTP. They run on the head node, where Ray's own state is, so that the loss of any
            other node costs no connection.
        cpus: cores of a replica.
        gpus: GPUs of a replica; part of one lets several share it.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    fronts: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise UsageError(
                f"{self.min_replicas} to {self.max_replicas} replicas cannot be: use 1 or more, the smaller first"
            )
        if self.fronts < 1 or self.cpus < 0 or self.gpus < 0:
            raise UsageError("fronts must be 1 or more, cpus and gpus 0 or more")


def application(config: ServeConfig, cluster: ClusterConfig) -> Any:
    """What ``serve.run`` takes."""
    replicas = serve.deployment(EngineReplica).options(name=ENGINE, **engine_options(config, cluster))
    front = serve.deployment(serve.ingress(lambda: build_front(config, ENGINE))())
    return front.options(name=FRONT, **front_options(config, cluster)).bind(replicas.bind(config))


def from_args(args: dict[str, Any]) -> Any:
    """The application of a Serve config file, whose ``args`` are those of `to_args`."""
    values = args["serve"]
    paths = {name: Path(values[name]) for name in ("checkpoint", "keys") if name in values}
    return application(ServeConfig(**values | paths), ClusterConfig(**args["cluster"]))


def to_args(config: ServeConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """What is not as it is by default, and the backbone, whose default may be another elsewhere, as plain values.

    Host and port are the proxy's; the key stays out of files: fronts take it from their environment.
    """
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in ("host", "port", "api_key") and getattr(config, field.name) != field.default
    } | {"backbone": config.backbone}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in changed.items()}
    return {"serve": plain, "cluster": asdict(cluster)}


def engine_options(config: ServeConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """A replica may hold two batches, one that is computed and one that gathers: Ray's default of 5 would be less."""
    most = 2 * config.max_batch_size
    return {
        "max_ongoing_requests": most,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=cluster.min_replicas,
            max_replicas=cluster.max_replicas,
            target_ongoing_requests=config.max_batch_size,
        ),
        "request_router_config": RequestRouterConfig(
            request_router_class="gpt_serve.cluster.routing.TaskRouter",
            request_router_kwargs={"busy": config.max_batch_size},
        ),
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": 2 * HEALTH_SECONDS,
        "logging_config": {"enable_access_log": False},
        "graceful_shutdown_timeout_s": config.drain,
        "ray_actor_options": {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
    }


def front_options(config: ServeConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """A front bounds its requests itself, with 503 and Retry-After, before Ray would."""
    return {
        "num_replicas": cluster.fronts,
        "max_surge_percent": 100,  # an update starts the new fronts before it ends the old ones
        "max_ongoing_requests": 4 * config.queue_limit,
        "logging_config": {"enable_access_log": False},
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": config.drain,
        "ray_actor_options": {"num_cpus": 0, "resources": {HEAD: 0.001}},
    }
