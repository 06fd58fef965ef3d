"""What a server can be told."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt_serve.errors import UsageError

EngineName = Literal["torch", "onnx"]

FASTEST: dict[str, EngineName] = {"cpu": "onnx", "cuda": "torch", "mps": "torch"}
"""What ``auto`` means on each kind of device: measured on the CPU by ``gpt-serve bench --only engines``."""


@dataclass(frozen=True)
class ServeConfig:
    """Options of one server.

    Attributes:
        host: address to listen on; ``0.0.0.0`` or ``::`` for all.
        port: TCP port; 0 picks a free one, which the ready line names.
        adapters: directory with one ``<task>/adapter.safetensors`` per task; watched, not copied.
        backbone: timm name or the bundled name; every adapter must have been trained on it.
        checkpoint: weights file for the backbone instead of the hub's.
        input_size: side of the backbone's input in pixels; None takes its own.
        device: ``cpu``, ``cuda``, ``cuda:<index>`` or ``mps``.
        engine: what runs the forward pass, ``torch``, ``onnx`` (onnxruntime) or ``auto``: the faster one.
        max_batch_size: most images in one forward pass.
        batch_timeout: seconds to wait for more requests once one is there.
        max_body_bytes: largest request body; beyond it 413.
        max_pixels: largest image, width times height; beyond it 413.
        queue_limit: most requests admitted at once, which also bounds the memory for their bodies; beyond it 503.
        deadline: seconds from the first header to the answer; beyond it 504.
        drain: seconds that admitted requests get to finish after SIGTERM or SIGINT.
        api_key: what ``X-API-Key`` must say for ``/predict`` and ``/tasks``; None asks for none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    adapters: Path = Path("adapters")
    backbone: str = "mae-vit-tiny-32"
    checkpoint: Path | None = None
    input_size: int | None = None
    device: str = "cpu"
    engine: EngineName | Literal["auto"] = "auto"
    max_batch_size: int = 32
    batch_timeout: float = 0.002
    max_body_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    queue_limit: int = 128
    deadline: float = 30.0
    drain: float = 30.0
    api_key: str | None = field(default_factory=lambda: os.environ.get("LIT_SERVER_API_KEY") or None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port} does not exist: use 1 to 65535, or 0 for any free one")
        for name in ("max_batch_size", "max_body_bytes", "max_pixels", "queue_limit", "deadline", "drain"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be more than 0")
        if self.batch_timeout < 0:
            raise UsageError(f"batch_timeout is {self.batch_timeout}: it must not be negative")
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
            raise UsageError(f"unknown device {self.device!r}: use cpu, cuda, cuda:<index> or mps")
        if self.engine not in ("torch", "onnx", "auto"):
            raise UsageError(f"unknown engine {self.engine!r}: use torch, onnx or auto")
        if (kind, self.engine) == ("mps", "onnx"):
            raise UsageError("onnxruntime computes on cpu and cuda only: use --engine torch, or another --device")

    @property
    def chosen_engine(self) -> EngineName:
        """``engine`` with ``auto`` resolved."""
        return FASTEST[self.device.partition(":")[0]] if self.engine == "auto" else self.engine
