"""The engine on onnxruntime, as far as it is not the same as on torch; what is the same: tests/test_engine.py."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine, Features, Row, planner_for
from gpt_serve.engine.onnx import FasterForward, OnnxForward
from gpt_serve.engine.scheduler import Scheduler
from gpt_serve.errors import GPTServeError
from gpt_serve.export.session import Graph
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import Layout
from tests.factories import make_adapter
from tests.serve.conftest import encode

KINDS = {"gated": {}, "linear": {"pool": "cls"}, "vpt-shallow": {"classes": 9}}


@pytest.fixture
def store(tiny: Backbone, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path)
    for seed, (method, options) in enumerate(KINDS.items()):
        store.publish(make_adapter(tiny.spec, method, method=method, seed=seed, **options))
    return store


def requests(*tasks: str) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(task, torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=generator)) for task in tasks]


def probabilities(results: Sequence[object]) -> list[torch.Tensor]:
    assert all(isinstance(result, Prediction) for result in results), results
    return [result.probabilities for result in results if isinstance(result, Prediction)]


def check_as_torch(backbone: Backbone, graph: Graph, store: AdapterStore, *tasks: str) -> None:
    """Whatever a server would choose: the graph answers for tasks alone and together as torch does."""
    batch = requests(*tasks)
    expected = probabilities(Engine(backbone, store).predict(batch))
    engine = Engine(backbone, store, forward=OnnxForward(graph))
    together = probabilities(engine.predict(batch))
    alone = [probabilities(engine.predict([request]))[0] for request in batch]
    for one, other, third in zip(expected, together, alone, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(third, one, rtol=1e-5, atol=1e-5)


def test_prompts_of_the_first_block_alone_and_together(tiny: Backbone, tiny_graph: Graph, store: AdapterStore) -> None:
    check_as_torch(tiny, tiny_graph, store, *KINDS, "gated", *["linear"] * 2)


def test_shifts_alone_and_among_others(tiny: Backbone, tiny_graph: Graph, store: AdapterStore) -> None:
    shift = 0.3 * torch.randn(tiny.spec.depth, 3, 24, generator=torch.Generator().manual_seed(7))
    store.publish(make_adapter(tiny.spec, "shifted", shift=shift))
    store.publish(make_adapter(tiny.spec, "bias", method="linear", shift=-shift))
    check_as_torch(tiny, tiny_graph, store, "shifted", "linear", "bias", "gated")


class Noting:
    """A forward pass that only notes the tasks it was asked for."""

    def __init__(self) -> None:
        self.tasks: list[set[str]] = []

    def __call__(self, rows: Sequence[Row]) -> Features:
        self.tasks.append({row.resident.task for row in rows})
        taps = Layout.joined([row.resident.place.layout for row in rows]).taps
        return Features(taps, tuple(torch.zeros(len(rows), 24) for _ in taps))


def test_closed_gates_go_to_torch_open_ones_to_onnxruntime(tiny: Backbone, store: AdapterStore) -> None:
    closed = torch.full((tiny.spec.depth - 1,), float("-inf"))
    store.publish(make_adapter(tiny.spec, "closed", prompts=60, gamma=closed, pool="cls"))
    store.publish(make_adapter(tiny.spec, "deep-open", deep=True))
    store.publish(make_adapter(tiny.spec, "few-closed", prompts=1, gamma=closed))
    onnx, other = Noting(), Noting()
    forward = FasterForward(onnx, other, planner_for(tiny))  # type: ignore[arg-type]
    engine = Engine(tiny, store, forward=forward)
    store.publish(make_adapter(tiny.spec, "shifted", shift=torch.ones(tiny.spec.depth, 3, tiny.spec.width)))
    for task in (*KINDS, "closed", "deep-open", "few-closed", "shifted"):
        engine.predict(requests(task))
    assert onnx.tasks == [{"gated"}, {"linear"}, {"vpt-shallow"}, {"few-closed"}, {"shifted"}]
    assert other.tasks == [{"closed"}, {"deep-open"}]


class Sabotaged(OnnxForward):
    """Hands onnxruntime images of a wrong size as soon as one of the tasks is ``linear``."""

    def __call__(self, rows: Sequence[Row]) -> Features:
        if any(row.resident.task == "linear" for row in rows):
            rows = [Row(row.resident, row.image[:, 1:]) for row in rows]
        return super().__call__(rows)


def test_a_run_that_onnxruntime_refuses_fails_its_own_request_only(
    tiny: Backbone, tiny_graph: Graph, store: AdapterStore
) -> None:
    bugs: list[Exception] = []
    engine = Engine(tiny, store, forward=Sabotaged(tiny_graph))
    scheduler = Scheduler(engine, max_batch=8, batch_timeout=1, overlap=False, on_error=bugs.append)
    futures = [scheduler.submit(task, encode(0), time.monotonic() + 60) for task in KINDS]
    errors = [type(future.exception(60)) for future in futures]
    scheduler.close()
    assert errors == [type(None), GPTServeError, type(None)]
    assert bugs and all("dimension" in str(bug) for bug in bugs)


def test_passes_need_nothing_of_the_exporter() -> None:
    """It takes seconds and 100 MB, which only the first start of a backbone is worth."""
    program = "import sys, gpt_serve.engine.onnx as onnx; onnx._outputs(12); sys.exit('onnxscript' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0
