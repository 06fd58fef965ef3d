"""From options to an application that runs on a Ray cluster."""

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import ray
from ray import serve

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cluster.app import NAME, PROXIES, ClusterConfig, application
from gpt_serve.errors import UsageError
from gpt_serve.serve.config import ServeConfig

CONNECT_SECONDS = 5


def deploy(config: ServeConfig, cluster: ClusterConfig, address: str | None, say: Callable[[str], None]) -> None:
    """Start or update the application on the cluster at ``address``, and leave it there.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, ``HOST:PORT``, or None to start one on this
            machine alone, which ends with a signal.
        say: told where it answers.

    Raises:
        UsageError: there is no such cluster, the adapters cannot be listed, or the application does not start.
    """
    AdapterStore(config.adapters).tasks()  # a store that cannot be reached is known before anything is started
    if address is not None and "://" not in address and address != "auto":
        _check_port(address)
    try:
        ray.init(address=address, log_to_driver=address is None, include_dashboard=False if address is None else None)
    except ConnectionError as error:
        raise UsageError(f"there is no Ray cluster at {address}: start one, or use --local") from error
    signal.signal(signal.SIGTERM, _interrupt)  # Ray's own handler would abort the process
    try:
        serve.start(http_options={"host": config.host, "port": config.port}, proxy_location=PROXIES)
        serve.run(application(config, cluster), name=NAME, route_prefix="/")
        say(f"ready on http://{config.host}:{config.port}")
        if address is None:
            _wait_for_signal()
            serve.shutdown()
    except RuntimeError as error:
        raise UsageError(
            f"the application does not start ({str(error).splitlines()[-1]}): see the log above"
        ) from error
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Raise where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UsageError(f"there is no Ray cluster at {address}: start one, or use --local") from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wait_for_signal() -> None:
    asked = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    asked.wait()
