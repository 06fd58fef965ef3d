"""A server of its own, and a client that asks it one question after another."""

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpt_serve.bench.setting import temporary_store, untrained_adapter, write_adapters
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import TINY

START_SECONDS = 180


@contextmanager
def serving(*options: str, dear_prompts: int = 2048, many: int = 0) -> Iterator["subprocess.Popen[bytes]"]:
    """A ``gpt-serve serve`` on 127.0.0.1; `port_of` tells where.

    Its tasks are ``honest``, ``noisy-0`` and ``noisy-1`` with 8 prompts each, ``dear`` with ``dear_prompts``, and
    ``many`` others, ``many-0`` and so on, with one prompt each.
    """
    backbone = Backbone.load(TINY.name)
    with temporary_store(backbone) as store:
        for task in ("honest", "noisy-0", "noisy-1"):
            store.publish(untrained_adapter(backbone, task, prompts=8))
        store.publish(untrained_adapter(backbone, "dear", prompts=dear_prompts))
        write_adapters(store, backbone, "many", many, (("gated", 1),))
        log = store.root.parent / "server.log"
        code = "from gpt_serve.cli.main import main; main()"
        command = [
            sys.executable,
            "-c",
            code,
            "serve",
            "--backbone",
            TINY.name,
            "--port",
            "0",
            "--adapters",
            str(store.root),
            *options,
        ]
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stderr=file, env=os.environ)
        try:
            process.port = _port(process, log)  # type: ignore[attr-defined]
            process.adapters = store.root  # type: ignore[attr-defined]
            yield process
        finally:
            process.terminate()
            process.wait(60)


def port_of(process: "subprocess.Popen[bytes]") -> int:
    """Where the server listens."""
    return int(process.port)  # type: ignore[attr-defined]


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        _, found, rest = log.read_text(encoding="utf-8").partition("ready on http://127.0.0.1:")
        if found and ":" in rest:
            return int(rest.partition(":")[0])
        time.sleep(0.1)
    raise SystemExit(f"the server did not start: {log.read_text(encoding='utf-8')[-500:]}")


@dataclass
class Client:
    """Asks for ``task`` until it is stopped, on a connection of its own each time.

    Attributes:
        seconds: of each request.
        failures: statuses other than 200, and what else went wrong.
    """

    port: int
    task: str
    image: bytes
    pause: float = 0.02
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def ask(self) -> None:
        """Once."""
        began = time.perf_counter()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            connection.request("POST", f"/predict/{self.task}", self.image, {"Content-Type": "image/jpeg"})
            status = connection.getresponse().status
            connection.close()
            if status != 200:
                self.failures.append(str(status))
        except OSError as error:
            self.failures.append(type(error).__name__)
        self.seconds.append(time.perf_counter() - began)

    def run(self, seconds: float) -> None:
        """For a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.ask()
            time.sleep(self.pause)

    def quantile(self, q: float) -> float:
        """Milliseconds."""
        return float(1000 * np.quantile(self.seconds, q)) if self.seconds else float("nan")


def attacked(port: int, attack: Callable[[int, threading.Event], None], threads: int) -> threading.Event:
    """Start ``attack`` in that many threads; set the event to end it."""
    stop = threading.Event()
    for _ in range(threads):
        threading.Thread(target=_bounded, args=(attack, port, stop), daemon=True).start()
    return stop


def _bounded(attack: Callable[[int, threading.Event], None], port: int, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            attack(port, stop)
        except (OSError, http.client.HTTPException):
            time.sleep(0.01)  # refused: try again
