"""What a server can be told."""

import ipaddress
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt_serve.errors import UsageError
from gpt_serve.model.catalog import DEFAULT_BACKBONE
from gpt_serve.specs import Precision

EngineName = Literal["torch", "onnx"]

FASTEST: dict[str, EngineName] = {"cpu": "onnx", "cuda": "torch"}
"""What ``auto`` means on each kind of device: measured on the CPU by ``gpt-serve bench --only engines``."""


@dataclass(frozen=True)
class ServeConfig:
    """Options of one server.

    Attributes:
        host: address to listen on; ``0.0.0.0`` or ``::`` for all.
        port: TCP port; 0 picks a free one, which the ready line names.
        adapters: directory with one ``<task>/adapter.safetensors`` per task, watched and not copied, or the address
            of a store elsewhere (``s3://bucket/prefix``), see `AdapterStore`.
        poll_seconds: how often a store elsewhere is listed.
        backbone: timm name or a bundled name; every adapter must have been trained on it.
        checkpoint: weights file for the backbone instead of the hub's.
        input_size: side of the backbone's input in pixels; None takes its own.
        device: ``cpu``, ``cuda``, ``cuda:<index>``, or several such separated by commas: each gets a worker with a
            backbone and a bank.
        replicas: workers on the CPU, each with all cores; on GPUs there is one for each device.
        engine: what runs the forward pass, ``torch``, ``onnx`` (onnxruntime) or ``auto``: the faster one.
        precision: of weights and activations; bf16 is computed by torch.
        compile: let ``torch.compile`` fuse the blocks; computed by torch.
        bank_bytes: memory for adapters on the device.
        host_bytes: memory for adapters that are ready to be copied there; 0 for none.
        trunk_cache_bytes: memory on the device for what images made of blocks that no task touches; 0 for none.
        max_batch_size: most images in one forward pass.
        batch_timeout: seconds that a decoded image waits for others that are on their way.
        max_body_bytes: largest request body; beyond it 413.
        max_pixels: largest image, width times height; beyond it 413.
        queue_limit: most images admitted at once, which also bounds the memory for them; beyond it 503. When all
            places are taken, the task with most of them gives one up to a task with fewer.
        http_workers: how many processes answer HTTP; limits, metrics and readiness are those of all together.
        trusted_proxies: addresses or networks, separated by commas, whose ``X-Forwarded-For`` and ``X-Forwarded-Proto``
            say who asks and how; ``*`` for all, empty for none.
        max_connections: most connections open at once; one more takes the place of the one that has been idle longest.
            Each HTTP process has an equal share of them.
        deadline: seconds from the first header to the answer; beyond it 504.
        drain: seconds that admitted requests get to finish after SIGTERM, SIGINT or SIGHUP.
        load_timeout: seconds that a worker may take to load the backbone.
        keys: file of tenants and their keys, see `gpt_serve.serve.keyfile`; followed while the server runs.
        access_log: file to which each request is logged as a line of JSON, ``-`` for standard output; None for no log.
        api_key: what ``X-API-Key`` must say for everything but ``/health``, ``/ready`` and ``/docs``; None asks for
            none. By default it comes from the environment variable ``LIT_SERVER_API_KEY``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    adapters: Path | str = Path("adapters")
    poll_seconds: float = 30.0
    backbone: str = DEFAULT_BACKBONE
    checkpoint: Path | None = None
    input_size: int | None = None
    device: str = "cpu"
    replicas: int = 1
    engine: EngineName | Literal["auto"] = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    bank_bytes: int = 2**30
    host_bytes: int = 2**30
    trunk_cache_bytes: int = 0
    max_batch_size: int = 32
    batch_timeout: float = 0.002
    max_body_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    queue_limit: int = 128
    http_workers: int = 1
    trusted_proxies: str = ""
    max_connections: int = 1024
    deadline: float = 30.0
    drain: float = 30.0
    load_timeout: float = 900.0
    keys: Path | None = None
    access_log: str | None = None
    api_key: str | None = field(default_factory=lambda: _key_of_environment(), repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port} does not exist: use 1 to 65535, or 0 for any free one")
        for name in (
            "bank_bytes",
            "poll_seconds",
            "max_batch_size",
            "max_body_bytes",
            "max_pixels",
            "queue_limit",
            "http_workers",
            "replicas",
            "max_connections",
            "deadline",
            "drain",
            "load_timeout",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be a number and more than 0")
        for name in ("host_bytes", "trunk_cache_bytes", "batch_timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be a number and not negative")
        _check_proxies(self.trusted_proxies)
        for device in self.device.split(","):
            if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
                raise UsageError(f"unknown device {device!r}: use cpu, cuda or cuda:<index>")
        if len(set(self.devices)) < len(self.device.split(",")) or ("cpu" in self.devices and "," in self.device):
            raise UsageError(f"{self.device} cannot be: name GPUs, each once")
        if self.replicas > 1 and self.device != "cpu":
            raise UsageError("--replicas is for the CPU: name several devices instead, such as cuda:0,cuda:1")
        if self.engine not in ("torch", "onnx", "auto"):
            raise UsageError(f"unknown engine {self.engine!r}: use torch, onnx or auto")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"unknown precision {self.precision!r}: use fp32 or bf16")
        if self.engine == "onnx" and self._needs_torch:
            raise UsageError("--precision bf16 and --compile are torch's: use --engine torch or auto")

    @property
    def devices(self) -> list[str]:
        """The device of each worker."""
        return ["cpu"] * self.replicas if self.device == "cpu" else self.device.split(",")

    @property
    def chosen_engine(self) -> EngineName:
        """``engine`` with ``auto`` resolved."""
        if self._needs_torch:
            return "torch"
        return FASTEST[self.device.partition(":")[0]] if self.engine == "auto" else self.engine

    @property
    def _needs_torch(self) -> bool:
        return self.compile or self.precision == "bf16"


def _check_proxies(proxies: str) -> None:
    for proxy in filter(None, map(str.strip, proxies.split(","))):
        try:
            proxy == "*" or ipaddress.ip_network(proxy)
        except ValueError:
            raise UsageError(
                f"trusted proxy {proxy!r} is no address: give one such as 127.0.0.1, a network such as 10.0.0.0/8, or *"
            ) from None


def _key_of_environment() -> str | None:
    """The key in ``LIT_SERVER_API_KEY``; None if that is not set.

    A variable that is set but empty comes from a mistake in a deployment, and the server must not stand open for it.
    White space around the key is left out: files that keys are read from end with a line break.
    """
    value = os.environ.get("LIT_SERVER_API_KEY")
    if value is None:
        return None
    key = value.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UsageError("LIT_SERVER_API_KEY is empty, or holds what no header can: unset it, or give a key in ASCII")
    return key
