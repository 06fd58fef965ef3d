"""Forward passes on the device: right, alike for mixed batches, and without a stop for the host."""

import random

import pytest
import torch

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine, Row, TorchForward
from gpt_serve.model.backbone import Backbone
from tests import reference
from tests.gpu.conftest import backbone_on, pixels
from tests.gpu.watch import HostWaits, launches, no_waiting


@pytest.fixture(scope="module")
def engine(backbone: Backbone, store: AdapterStore) -> Engine:
    return Engine(backbone, store)


def answered(engine: Engine, requests: list[tuple[str, torch.Tensor]]) -> list[Prediction]:
    results = engine.predict(requests)
    assert all(isinstance(result, Prediction) for result in results), results
    return results  # type: ignore[return-value]


def check_same(actual: list[Prediction], expected: list[Prediction], atol: float = 1e-4) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one.task, one.revision) == (other.task, other.revision)
        torch.testing.assert_close(one.probabilities, other.probabilities, rtol=0, atol=atol)


def test_every_kind_equals_the_reference(engine: Engine, adapters: list[Adapter]) -> None:
    """The slow one, on the CPU."""
    model = backbone_on("cpu").model
    preprocess = engine.backbone.spec.preprocess
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (preprocess.mean, preprocess.std))
    results = answered(engine, [(adapter.task, pixels(engine.backbone, n)) for n, adapter in enumerate(adapters)])
    for n, (result, adapter) in enumerate(zip(results, adapters, strict=True)):
        expected = reference.forward(
            model,
            (pixels(engine.backbone, n).float() / 255 - mean) / std,
            pool=adapter.pool,
            head_weight=adapter.head_weight,
            head_bias=adapter.head_bias,
            prompt=adapter.prompt,
            gamma=adapter.gamma,
            tau=adapter.tau,
        )
        torch.testing.assert_close(result.probabilities, expected.logits.softmax(dim=0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_batch_equals_one_at_a_time(engine: Engine, adapters: list[Adapter], seed: int) -> None:
    choose = random.Random(seed)
    requests = [(choose.choice(adapters).task, pixels(engine.backbone, n)) for n in range(48)]
    alone = [answer for request in requests for answer in answered(engine, [request])]
    check_same(answered(engine, requests), alone)


def test_bf16_rounds_the_same_answers(engine: Engine, store: AdapterStore, device: str) -> None:
    half = backbone_on(device)
    half.cast(torch.bfloat16)
    requests = [(task, pixels(engine.backbone, n)) for n, task in enumerate(store.tasks())]
    check_same(answered(Engine(half, store), requests), answered(engine, requests), atol=0.1)


@pytest.mark.slow
def test_a_compiled_block_answers_alike_for_every_kind(engine: Engine, store: AdapterStore) -> None:
    compiled = Engine(engine.backbone, store, forward=TorchForward(engine.backbone, compiled=True))
    tasks = store.tasks()
    for batch in (1, 5):
        requests = [(task, pixels(engine.backbone, n)) for task in tasks for n in range(batch)]
        check_same(answered(compiled, requests), answered(engine, requests))


def passes(engine: Engine, tasks: list[str]) -> list[list[Row]]:
    """The passes of a batch with an image for each of ``tasks``, ready to be computed."""
    rows: list[Row] = []
    for n, task in enumerate(tasks):
        with engine.bank.holding(task) as resident:
            row = engine.prepare(resident, pixels(engine.backbone, n))
            assert isinstance(row, Row)
            rows.append(row)
    plan = engine.planner.plan([row.resident.place.layout for row in rows])
    return [[rows[index] for index in part] for part in plan]


def test_the_host_never_waits_inside_a_pass(engine: Engine, store: AdapterStore) -> None:
    """Alone, where tensors are views into the slab, mixed, and with rows that share an image."""
    tasks = store.tasks()
    work = [part for task in tasks for part in passes(engine, [task])] + passes(engine, tasks * 2)
    work += [[part[0], *part] for part in work]
    for part in work:
        engine.forward(part)  # what a place remembers of itself is made once
    for part in work:
        with no_waiting():
            engine.forward(part)


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: tensor.cpu(),
        lambda tensor: bool((tensor > 0).all()),
        lambda tensor: tensor.nonzero(),
        lambda tensor: torch.tensor([1.0], device=tensor.device),
        lambda tensor: torch.ones(3).to(tensor.device),
    ],
)
def test_waiting_would_be_noticed(wait, device: str) -> None:
    tensor = torch.ones(3, device=device)
    with no_waiting(), pytest.raises((HostWaits, RuntimeError)):
        wait(tensor)
    with no_waiting():
        torch.ones(3).to(tensor.device, non_blocking=True)


def test_launches_do_not_grow_with_the_tasks_of_a_batch(engine: Engine, adapters: list[Adapter]) -> None:
    """A pass gathers any number of adapters at once."""
    tasks = [adapter.task for adapter in adapters]
    counts = {}
    for name, batch in (("each kind once", tasks), ("each kind eight times", tasks * 8)):
        parts = passes(engine, batch)
        joined = [row for part in parts for row in part]
        counts[name] = launches(lambda joined=joined: engine.forward(joined))
    print(f"kernels of a mixed pass on {engine.backbone.device}: {counts}")
    one, many = counts.values()
    assert one == many
    alone = passes(engine, tasks[:1])[0]
    print(f"kernels of a pass of one task without prompts: {launches(lambda: engine.forward(alone))}")
