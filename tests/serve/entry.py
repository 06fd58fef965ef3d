"""A server process for the tests: `run_server` with options from a JSON argument.

With ``stub`` neither it nor its worker imports torch: requests are answered by their task's name::

    held-*     once there is no file ``hold`` in the folder of adapters
    hang-*     never
    bug-*      with what the scheduler makes of an exception in the engine
    others     at once

The worker loads once there is no file ``hold-start`` in that folder, and refuses the backbone ``refused``.

With ``trouble`` the real engine does what the task's name asks for::

    heavy-*    takes half a second for each image
    stuck-*    has its file where no look at it ever comes back
"""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

from gpt_serve.errors import DeadlineExceeded, GPTServeError, UnsupportedBackbone
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

    def to_dict(self, top_k: int) -> dict[str, Any]:
        best = [{"label": "yes", "probability": 0.75}, {"label": "no", "probability": 0.25}]
        return {"task": self.task, "revision": self.revision, "predictions": best[:top_k]}


class StubScheduler:
    """Answers each request in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.engine = SimpleNamespace(backbone=SimpleNamespace(spec=SPEC))
        self.folder = folder
        self.hung_since = float("inf")

    def busy(self) -> float:
        return max(0.0, time.monotonic() - self.hung_since)

    def abandon(self, future: "Future[Answered]") -> None:
        with suppress(InvalidStateError):
            future.set_exception(DeadlineExceeded("nobody waits"))

    def submit(self, task: str, image: bytes, expires: float, tenant: str) -> "Future[Answered]":
        future: Future[Answered] = Future()
        Thread(target=self._answer, args=(task, future), daemon=True).start()
        return future

    def _answer(self, task: str, future: "Future[Answered]") -> None:
        kind = task.partition("-")[0]
        if kind == "hang":
            self.hung_since = min(self.hung_since, time.monotonic())
            return
        if kind == "held":
            wait_while(self.folder / "hold")
        with suppress(InvalidStateError):  # nobody waits any more
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


class Troubled:
    """The engine, but for some tasks."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.bank, self.backbone = engine, engine.bank, engine.backbone

    def prepare(self, resident: Any, image: bytes) -> Any:
        row = self.engine.prepare(resident, image)
        return row if isinstance(row, GPTServeError) else self.row(resident, row.image)

    def row(self, resident: Any, image: Any) -> Any:
        row = self.engine.row(resident, image)
        return replace(row, work=100 * row.work) if resident.task.startswith("heavy") else row

    def compute(self, rows: Sequence[Any]) -> list[Any]:
        time.sleep(0.5 * sum(row.resident.task.startswith("heavy") for row in rows))
        return list(self.engine.compute(rows))


class TroubledAPI(PredictAPI):
    def load(self, device: str) -> Any:
        scheduler = super().load(device)
        scheduler.engine = Troubled(scheduler.engine)
        store = scheduler.engine.bank.store
        signature = store.signature

        def looking(task: str) -> Any:
            time.sleep(3600 if task.startswith("stuck") else 0)
            return signature(task)

        store.signature = looking
        return scheduler


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
    stub, trouble = options.pop("stub", False), options.pop("trouble", False)
    if stub:
        sys.modules["gpt_serve.adapters.store"] = SimpleNamespace(AdapterStore=StubStore)  # type: ignore[assignment]
    paths = {name: Path(options[name]) for name in ("checkpoint", "keys") if name in options}
    try:
        return run_server(ServeConfig(**options | paths), StubAPI if stub else TroubledAPI if trouble else PredictAPI)
    except GPTServeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
