"""A server process for the tests: `run_server` with options from a JSON argument.

``trouble`` adds an engine that misbehaves on request, by the task's name::

    sleepy-*   holds the whole batch up for 0.4 s
    hang-*     never returns
    bug-*      raises what no engine should
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_serve.errors import GPTServeError
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.litserve import PredictAPI
from gpt_serve.serve.runner import run_server


class Troubled:
    """An engine that does to a batch what the task names in it ask for."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.bank, self.prepare = engine, engine.bank, engine.prepare

    def compute(self, rows: Sequence[Any]) -> list[Any]:
        kinds = {row.resident.task.partition("-")[0] for row in rows}
        if "sleepy" in kinds:
            time.sleep(0.4)
        if "hang" in kinds:
            time.sleep(3600)
        if "bug" in kinds:
            raise RuntimeError("a bug in the engine")
        return list(self.engine.compute(rows))


class TroubledAPI(PredictAPI):
    def setup(self, device: str) -> None:
        super().setup(device)
        self.scheduler.engine = Troubled(self.scheduler.engine)  # type: ignore[assignment]


def main() -> int:
    options = json.loads(sys.argv[1])
    trouble = options.pop("trouble", False)
    paths = {name: Path(options[name]) for name in ("adapters", "checkpoint") if name in options}
    try:
        return run_server(ServeConfig(**options | paths), TroubledAPI if trouble else PredictAPI)
    except GPTServeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
