"""The application as files: a Serve config for a Ray cluster, a RayService for Kubernetes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from gpt_serve.cluster.app import NAME, PROXIES, ClusterConfig, to_args
from gpt_serve.errors import UsageError
from gpt_serve.files import replacing
from gpt_serve.serve.config import ServeConfig

IMPORT_PATH = "gpt_serve.cluster.app:from_args"
IMAGE = "gpt-serve:latest"


def serve_config(config: ServeConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """What ``serve deploy FILE`` takes, checked against Ray's own schema."""
    value = {
        "proxy_location": PROXIES,
        "http_options": {"host": config.host, "port": config.port},
        "applications": [
            {"name": NAME, "route_prefix": "/", "import_path": IMPORT_PATH, "args": to_args(config, cluster)}
        ],
    }
    ServeDeploySchema.model_validate(value)
    return value


def ray_service(config: ServeConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """What ``kubectl apply --filename FILE`` takes where KubeRay is installed.

    Kubernetes updates it without a gap: KubeRay starts a second cluster and moves the traffic once that one is ready.
    """
    config = replace(config, host="0.0.0.0")  # a pod is reached from outside of it
    worker: dict[str, Any] = {"cpu": str(max(1, round(cluster.cpus))), "memory": "4Gi"}
    if cluster.gpus:
        worker["nvidia.com/gpu"] = str(max(1, round(cluster.gpus)))
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_config(config, cluster), sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": ray.__version__,
                "headGroupSpec": {
                    # No replicas on the head node: it holds the cluster's state and the fronts.
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod("ray-head", {"cpu": "2", "memory": "4Gi"}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "replicas",
                        "replicas": cluster.min_replicas,
                        "minReplicas": cluster.min_replicas,
                        "maxReplicas": cluster.max_replicas,
                        "rayStartParams": {},
                        "template": _pod("ray-worker", worker),
                    }
                ],
                "enableInTreeAutoscaling": cluster.max_replicas > cluster.min_replicas,
            },
        },
    }


def write(folder: Path, config: ServeConfig, cluster: ClusterConfig) -> list[Path]:
    """Write ``serve.yaml`` and ``rayservice.yaml``; their paths.

    Raises:
        UsageError: the disk refuses.
    """
    contents = {"serve.yaml": serve_config(config, cluster), "rayservice.yaml": ray_service(config, cluster)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--yaml {folder} cannot be written: {error.strerror}") from error
    return [folder / name for name in contents]


def _pod(name: str, resources: dict[str, Any]) -> dict[str, Any]:
    container = {"name": name, "image": IMAGE, "resources": {"requests": resources, "limits": dict(resources)}}
    return {"spec": {"containers": [container]}}
