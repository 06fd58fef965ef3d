"""Training by the paper's recipe against plain SGD on plain tensors through the slow reference.

The backbone of the training loop has dropout and drop-path everywhere, the reference's has none: what is frozen stays
in evaluation mode.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View, shuffled_batches
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import Trainer
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.methods.start import start_from_data
from gpt_serve.train.recipes.recipe import make_recipe
from tests import reference
from tests.tiny_vit import PREPROCESS, tiny_backbone, tiny_vit
from tests.train.conftest import Recorder

Tensors = dict[str, Tensor]

DROPS = {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "pos_drop_rate": 0.5}
RATES = [0.0, 0.05, 0.0375, 0.0125]  # of four epochs: one of warm-up, then half a cosine over three
METHODS: dict[str, dict[str, Any]] = {
    "gated": {},
    "gated, fresh norm": {"norm": "fresh"},
    "gated without temperatures": {"temperature": False},
    "gated, hard": {"gate": "hard"},
    "gated-deep": {"method": "gated-deep"},
    "gated-deep, hard, from tokens": {"method": "gated-deep", "gate": "hard", "prompt_init": "tokens"},
    "vpt-shallow": {"method": "vpt-shallow"},
    "vpt-deep": {"method": "vpt-deep"},
    "spt-deep": {"method": "spt-deep"},
    "linear": {"method": "linear"},
}


def straight_through(gamma: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Gates of 0 or 1 whose gradient is that of the relaxed gate."""
    relaxed = torch.sigmoid((gamma + uniform.log() - (1 - uniform).log()) / temperature)
    return relaxed.round().detach() + relaxed - relaxed.detach()


def expected_tensors(plain: nn.Module, view: View, start: Tensors, hard: bool, draws: Iterator[Tensor]) -> Tensors:
    """What is learned after four epochs in batches of six, by a momentum of 0.9; ``draws`` are uniform in (0, 1)."""
    learned, velocity = start, {key: torch.zeros_like(value) for key, value in start.items()}
    for epoch, rate in enumerate(RATES):
        for batch in shuffled_batches(len(view), 6, 0, epoch):
            learned = {key: value.detach().requires_grad_() for key, value in learned.items()}
            tensors = dict(learned)
            if hard:
                gates = straight_through(tensors.pop("gamma"), next(draws), math.exp(-math.log(2) * epoch / 3))
            losses = []
            for row, index in enumerate(batch):
                image, target = view[index]
                drawn = {"gates": gates[row]} if hard else {}
                found = reference.forward(plain, (image / 255 - 0.5) / 0.5, pool="mean", **tensors, **drawn)
                losses.append(F.cross_entropy(found.logits, torch.tensor(target)))
            gradients = torch.autograd.grad(torch.stack(losses).mean(), list(learned.values()))
            for key, gradient in zip(learned, gradients, strict=True):
                velocity[key] = 0.9 * velocity[key] + gradient
                learned[key] = learned[key].detach() - rate * velocity[key]
            if "tau" in learned:
                learned["tau"].clamp_(0.01, 10)
    return learned


def copies(module: AdapterModule) -> Tensors:
    return {key.replace(".", "_"): value.detach().clone() for key, value in module.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_training_follows_plain_sgd_through_the_reference(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    common = {"prompts": 3, "prompt_dropout": 0.0, "gate_init": 1.0, "epochs": 4, "warmup": 1, "batch_size": 6}
    recipe = make_recipe("paper", lr=0.05, **common, **METHODS[name])
    backbone, plain = tiny_backbone(**DROPS), tiny_vit().eval()
    if recipe.norm == "fresh":
        plain.norm = nn.LayerNorm(24, eps=plain.norm.eps)
    view = View(open_dataset(str(colours), 0).train[::3], PREPROCESS, None, "none", 0)
    module = build_module(backbone, recipe, 3)
    assert isinstance(module, AdapterModule)
    start_from_data(backbone, module, TrainingJob("t", "", tmp_path, recipe, workers=0), view, Inputs(0), Recorder())
    start = copies(module)

    draws: list[Tensor] = []
    uniform = torch.rand
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **options: draws.append(uniform(*size, **options)) or draws[-1])
        trainer = Trainer(backbone, module, recipe, train=view, val=view, world=World(), inputs=Inputs(0))
        trainer.fit(lambda *_: None, lambda _: None)
    assert not any(part.training for part in backbone.model.modules())

    expected = expected_tensors(plain, view, start, recipe.gate == "hard", iter(draws))
    for key, value in copies(module).items():
        assert (expected[key] - start[key]).abs().max() > 1e-3, f"{key} did not move"
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4, msg=lambda text, key=key: key + text)
