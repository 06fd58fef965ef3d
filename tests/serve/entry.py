"""A server process for the tests: `run_server` with options from a JSON argument.

With ``stub`` neither it nor its worker imports torch: requests are answered by their task's name::

    held-*     once there is no file ``hold`` in the folder of adapters
    hang-*     never
    bug-*      with what the scheduler makes of an exception in the engine
    others     at once

The worker loads once there is no file ``hold-start`` in that folder, and refuses the backbone ``refused``.
"""

import json
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

from gpt_serve.errors import GPTServeError, UnsupportedBackbone
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.litserve import PredictAPI
from gpt_serve.serve.messages import Stats
from gpt_serve.serve.metrics import _COUNTED, _HELD
from gpt_serve.serve.runner import run_server
from gpt_serve.specs import BackboneSpec, Preprocess

PREPROCESS = Preprocess((32, 32), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
SPEC = BackboneSpec(name="stub", fingerprint="ab" * 32, depth=3, width=16, pool="mean", preprocess=PREPROCESS)


@dataclass(frozen=True)
class Answered:
    """What the worker makes its answer of."""

    task: str
    revision: str = "0123456789ab"

    def top(self, k: int) -> list[tuple[str, float]]:
        return [("yes", 0.75), ("no", 0.25)][:k]


class StubScheduler:
    """Answers each request in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.engine = SimpleNamespace(backbone=SimpleNamespace(spec=SPEC))
        self.folder = folder

    def submit(self, task: str, image: bytes, expires: float) -> "Future[Answered]":
        future: Future[Answered] = Future()
        Thread(target=self._answer, args=(task, future), daemon=True).start()
        return future

    def _answer(self, task: str, future: "Future[Answered]") -> None:
        kind = task.partition("-")[0]
        if kind == "hang":
            return
        if kind == "held":
            wait_while(self.folder / "hold")
        if kind == "bug":
            future.set_exception(GPTServeError("RuntimeError in the engine"))
        else:
            future.set_result(Answered(task))


class StubAPI(PredictAPI):
    """The real worker around `StubScheduler`."""

    def load(self, device: str) -> Any:
        wait_while(Path(self.config.adapters) / "hold-start")
        if self.config.backbone == "refused":
            raise UnsupportedBackbone("backbone refused: it is no Vision Transformer")
        return StubScheduler(Path(self.config.adapters))

    def stats(self) -> Stats:
        return Stats(dict.fromkeys([*_HELD, *_COUNTED], 0.0))


class StubStore:
    """Has every task, and lists none."""

    def __init__(self, root: str, spec: BackboneSpec, *, poll_seconds: float) -> None: ...

    def signature(self, task: str) -> None: ...

    def tasks(self) -> list[str]:
        return []

    describe = tasks


def wait_while(file: Path) -> None:
    while file.exists():
        time.sleep(0.01)


def main() -> int:
    options = json.loads(sys.argv[1])
    stub = options.pop("stub", False)
    if stub:
        sys.modules["gpt_serve.adapters.store"] = SimpleNamespace(AdapterStore=StubStore)  # type: ignore[assignment]
    paths = {name: Path(options[name]) for name in ("checkpoint",) if name in options}
    try:
        return run_server(ServeConfig(**options | paths), StubAPI if stub else PredictAPI)
    except GPTServeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
