"""The engine on onnxruntime, as far as it is not the same as on torch; what is the same: tests/test_engine.py."""

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gpt_serve.backbone import Backbone
from gpt_serve.engine import Engine, Prediction, Row
from gpt_serve.export import forward as forward_module
from gpt_serve.export.forward import OnnxForward
from gpt_serve.export.session import Graph
from gpt_serve.serve import ServeConfig
from gpt_serve.serve.worker import PredictAPI
from gpt_serve.store import AdapterStore
from tests.factories import make_adapter
from tests.serve.conftest import encode

KINDS = {"gated": {}, "linear": {"pool": "cls"}, "vpt-deep": {"classes": 9}}


@pytest.fixture
def store(tiny: Backbone, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path)
    for seed, (method, options) in enumerate(KINDS.items()):
        store.publish(make_adapter(tiny.spec, method, method=method, seed=seed, **options))
    return store


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters were put into each bank that was made."""
    made: list[int] = []
    real = forward_module.bank_inputs

    def count(adapters: Sequence[object], *others: object) -> object:
        made.append(len(adapters))
        return real(adapters, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(forward_module, "bank_inputs", count)
    return made


def requests(*tasks: str) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(task, torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=generator)) for task in tasks]


def probabilities(results: Sequence[object]) -> list[torch.Tensor]:
    assert all(isinstance(result, Prediction) for result in results), results
    return [result.probabilities for result in results if isinstance(result, Prediction)]


def test_the_backbones_weights_are_not_needed(tiny: Backbone, tiny_graph: Graph, store: AdapterStore) -> None:
    empty = Backbone(copy.deepcopy(tiny.model), tiny.spec, "cpu")
    empty.model.to_empty(device="meta")
    batch = requests(*KINDS, "gated")
    actual = Engine(empty, store, forward=OnnxForward(tiny_graph)).predict(batch)
    expected = Engine(tiny, store).predict(batch)
    for one, other in zip(probabilities(actual), probabilities(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_bank_is_kept_until_a_batch_needs_another(
    tiny: Backbone, tiny_graph: Graph, store: AdapterStore, stacked: list[int]
) -> None:
    engine = Engine(tiny, store, forward=OnnxForward(tiny_graph))
    engine.predict(requests("gated", "linear"))
    engine.predict(requests("linear", "linear", "gated"))
    assert stacked == [2]
    engine.predict(requests("gated"))
    assert stacked == [2, 1]
    before = probabilities(engine.predict(requests("gated")))
    store.publish(make_adapter(tiny.spec, "gated", seed=50))
    after = probabilities(engine.predict(requests("gated")))
    assert stacked == [2, 1, 1]
    expected = probabilities(Engine(tiny, store).predict(requests("gated")))
    torch.testing.assert_close(after[0], expected[0], rtol=1e-5, atol=1e-5)
    assert (after[0] - before[0]).abs().max() > 1e-3


class Sabotaged(OnnxForward):
    """Hands onnxruntime images of a wrong size as soon as one of the tasks is ``linear``."""

    def __call__(self, rows: Sequence[Row]) -> list[Prediction]:
        if any(row.resident.task == "linear" for row in rows):
            rows = [Row(row.resident, row.image[:, 1:]) for row in rows]
        return super().__call__(rows)


def test_a_run_that_onnxruntime_refuses_fails_its_own_request_only(
    tiny: Backbone, tiny_graph: Graph, store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    api = PredictAPI(ServeConfig())
    api.engine = Engine(tiny, store, forward=Sabotaged(tiny_graph))
    replies = api.predict([(task, encode(0), 5, time.monotonic() + 60) for task in KINDS])
    assert [kind for kind, *_ in replies] == ["", "GPTServeError", ""]
    assert "onnxruntime" in caplog.text.lower()
