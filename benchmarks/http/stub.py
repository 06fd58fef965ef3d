"""A server whose engine answers at once: ``python -m benchmarks.http.stub '{"port": 0, ...}'``."""

import json
import sys
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

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
        """Five labels."""
        best = [{"label": f"label-{number}", "probability": 0.2} for number in range(5)]
        return {"task": self.task, "revision": self.revision, "predictions": best[:top_k]}


class StubScheduler:
    """Takes no time."""

    engine = SimpleNamespace(backbone=SimpleNamespace(spec=SPEC))

    def busy(self) -> float:
        """Never."""
        return 0.0

    def abandon(self, future: "Future[Answered]") -> None:
        """It is done."""

    def submit(self, task: str, image: bytes, expires: float, tenant: str) -> "Future[Answered]":
        """The answer."""
        future: Future[Answered] = Future()
        future.set_result(Answered(task))
        return future


class StubAPI(PredictAPI):
    """The real worker around `StubScheduler`."""

    def load(self, device: str) -> Any:
        """At once."""
        return StubScheduler()

    def stats(self) -> Stats:
        """Zeros."""
        return Stats(dict.fromkeys([*_HELD, *_COUNTED], 0.0))


if __name__ == "__main__":
    sys.exit(run_server(ServeConfig(**json.loads(sys.argv[1])), StubAPI))
