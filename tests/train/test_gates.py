"""Hard gates: the law they are drawn by, their gradient, and what is stored and served."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import embed, prompted_features
from gpt_serve.train.closing.close import ClosingJob, close_gates
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import Trainer
from gpt_serve.train.methods.gates import gumbel_temperature, harden, sample_gates
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.recipes.recipe import Recipe, make_recipe
from tests import reference
from tests.tiny_vit import PREPROCESS, random_images, random_tensors
from tests.train.conftest import Recorder


def hard_module(backbone: Backbone, gamma: Tensor, *, deep: bool = False) -> AdapterModule:
    method = "gated-deep" if deep else "gated"
    tensors = random_tensors(method, backbone.spec.depth, backbone.spec.width) | {"gamma": gamma}
    return AdapterModule(backbone.spec, nn.Linear(backbone.spec.width, 3), **tensors, hard=True)


@pytest.mark.parametrize("gamma", [-5.0, -1.0, 0.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_gate_opens_with_the_probability_of_its_prior(gamma: float, temperature: float) -> None:
    torch.manual_seed(0)
    gates = sample_gates(torch.tensor([gamma]), 20_000, temperature)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    p = 1 / (1 + math.exp(-gamma))
    assert gates.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


def test_the_gradient_is_that_of_the_relaxed_gate() -> None:
    """Straight-through, written out: logistic noise from the same uniform draws, and the sigmoid's derivative."""
    gamma = torch.tensor([-1.5, 0.3, 2.0], requires_grad=True)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    gates = sample_gates(gamma, 4, 0.7)
    (gates * weights).sum().backward()
    torch.manual_seed(7)
    uniform = torch.rand(4, 3)
    for gate in range(3):
        expected = 0.0
        for row, u in enumerate(uniform[:, gate].tolist()):
            relaxed = 1 / (1 + math.exp(-(gamma[gate].item() + math.log(u) - math.log(1 - u)) / 0.7))
            assert gates[row, gate].item() == (1.0 if relaxed > 0.5 else 0.0)
            expected += weights[row, gate].item() * relaxed * (1 - relaxed) / 0.7
        assert gamma.grad is not None
        assert gamma.grad[gate].item() == pytest.approx(expected, rel=1e-4)


def test_infinite_priors_give_the_same_gate_always_and_finite_gradients() -> None:
    gamma = torch.tensor([-torch.inf, torch.inf, 0.0], requires_grad=True)
    gates = sample_gates(gamma, 100, 0.5)
    assert gates[:, 0].max() == 0 and gates[:, 1].min() == 1
    gates.sum().backward()
    assert gamma.grad is not None and gamma.grad.isfinite().all()


def test_the_temperature_falls_from_1_to_a_half() -> None:
    assert [gumbel_temperature(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, math.sqrt(0.5), 0.5])


def test_hard_priors_are_infinite_by_their_sign() -> None:
    assert harden(torch.tensor([-3.0, -0.0, 0.0, 1e-6])).tolist() == [-math.inf, -math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("deep", [False, True])
def test_training_runs_each_image_with_gates_of_its_own(tiny: Backbone, deep: bool) -> None:
    """Image by image against the plain reference, with the gates that were drawn."""
    module = hard_module(tiny, torch.tensor([0.2, -0.3]), deep=deep)
    module.train()
    images = random_images(8)
    torch.manual_seed(3)
    logits = module(tiny.model, images)
    torch.manual_seed(3)
    gates = sample_gates(module.gamma, 8, module.gumbel_temperature)  # type: ignore[arg-type]
    assert len(gates.unique(dim=0)) > 1
    for index in range(8):
        expected = reference.forward(
            tiny.model,
            images[index],
            pool=tiny.spec.pool,
            head_weight=module.head.weight,
            head_bias=module.head.bias,
            prompt=module.prompt,
            gamma=torch.where(gates[index] > 0.5, torch.inf, -torch.inf),
            tau=module.tau,
        )
        torch.testing.assert_close(logits[index], expected.logits, atol=1e-4, rtol=1e-4)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
    assert module.gamma is not None and module.gamma.grad is not None and module.gamma.grad.abs().min() > 0


def test_evaluation_computes_what_is_stored(tiny: Backbone) -> None:
    module = hard_module(tiny, torch.tensor([0.2, -0.3])).eval()
    stored = module.stored()
    assert stored["gamma"].tolist() == [math.inf, -math.inf]
    assert module.batch(2).layout.closed == (False, True)
    images = random_images(4)
    tensors = {name: stored[name] for name in ("prompt", "gamma", "tau")}
    served = AdapterBatch.single(
        depth=3, width=24, pool=tiny.spec.pool, **tensors, closed=torch.isneginf(stored["gamma"]).tolist()
    )
    expected = module.head(prompted_features(tiny.model, embed(tiny.model, images), served))
    torch.testing.assert_close(module(tiny.model, images), expected)


def test_the_schedule_reaches_the_module(tiny: Backbone) -> None:
    module = hard_module(tiny, torch.zeros(2))
    module.anneal(1.0)
    assert module.gumbel_temperature == 0.5


def hard_adapter(backbone: Backbone, colours: Path, adapters: Path, **changes: object) -> Adapter:
    recipe = make_recipe("adamw", prompts=3, epochs=4, warmup=1, lr=0.1, batch_size=8, gate="hard", gate_init=0.0)
    work = TrainingJob("colours", str(colours), adapters, dataclasses.replace(recipe, **changes))  # type: ignore[arg-type]
    assert train_adapter(backbone, work, Recorder(), World()) is not None
    return AdapterStore(adapters).load("colours").adapter


@pytest.mark.parametrize("method", ["gated", "gated-deep"])
def test_a_trained_adapter_has_gates_of_0_or_1_and_is_served_as_it_was_evaluated(
    tiny: Backbone, colours: Path, tmp_path: Path, method: str
) -> None:
    adapter = hard_adapter(tiny, colours, tmp_path, method=method)
    assert adapter.gamma is not None and adapter.gamma.isinf().all()
    assert adapter.training["recipe"]["gate"] == "hard"
    engine = Engine(tiny, AdapterStore(tmp_path))
    samples = open_dataset(str(colours), 0).test
    results = engine.predict([("colours", sample.read()) for sample in samples])
    right = [
        isinstance(result, Prediction) and result.labels.index(result.top(1)[0][0]) == sample.target
        for sample, result in zip(samples, results, strict=True)
    ]
    assert sum(right) / len(right) == adapter.training["metrics"]["test_accuracy"]


def test_hard_gates_that_are_open_can_be_closed(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    adapter = hard_adapter(tiny, colours, tmp_path, gate_init=-8.0)
    assert adapter.gamma is not None and adapter.gamma.isposinf().all()
    step = close_gates(tiny, ClosingJob("colours", str(colours), tmp_path, tolerance=100.0), Recorder())["closing"]
    assert step["closed"] == [1, 2]
    closed = AdapterStore(tmp_path).load("colours").adapter.gamma
    assert closed is not None and closed.isneginf().all()


def test_hard_gates_need_gates() -> None:
    with pytest.raises(UsageError, match=r"--gate hard: the method vpt-deep learns no gates"):
        Recipe(method="vpt-deep", gate="hard")


@pytest.mark.parametrize(
    ("method", "temperature", "learned"),
    [("gated", None, True), ("gated", False, False), ("vpt-shallow", None, False), ("vpt-shallow", True, True)],
)
def test_temperatures_are_one_flag_apart(tiny: Backbone, method: str, temperature: bool | None, learned: bool) -> None:
    recipe = Recipe(method=method, temperature=temperature)
    assert (build_module(tiny, recipe, 3).tau is not None) is learned
    assert recipe.to_dict()["temperature"] is learned


def test_the_temperature_falls_over_the_epochs_of_training(tiny: Backbone, colours: Path) -> None:
    recipe = make_recipe("adamw", prompts=2, epochs=3, warmup=1, batch_size=8, gate="hard")
    view = View(open_dataset(str(colours), 0).train[::3], PREPROCESS, None, "none", 0)
    module = build_module(tiny, recipe, 3)
    trainer = Trainer(tiny, module, recipe, train=view, val=view, world=World(), inputs=Inputs(0))
    seen: list[float] = []
    trainer.fit(lambda *_: seen.append(module.gumbel_temperature), lambda _: None)
    assert list(dict.fromkeys(seen)) == pytest.approx([1.0, math.sqrt(0.5), 0.5])
