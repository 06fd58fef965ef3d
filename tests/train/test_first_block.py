"""Prompts that enter a later block (Fig. 1): from the recipe to the served answer."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import ExportError, UsageError
from gpt_serve.export.job import ExportOptions, export_task, export_tasks
from gpt_serve.images.decode import decode
from gpt_serve.images.preprocess import center_crop, normalize, resize
from gpt_serve.insight.inspect import inspect_adapter
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Tap
from gpt_serve.train import fit
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.methods import taps
from gpt_serve.train.methods.gates import sample_gates
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.methods.start import patch_tokens, prompts_from_tokens
from gpt_serve.train.recipes.recipe import FirstBlock, Recipe, make_recipe
from tests import reference
from tests.factories import make_adapter
from tests.tiny_vit import PREPROCESS, random_images, random_tensors, tiny_backbone
from tests.train.conftest import Recorder

METHODS: dict[str, dict[str, Any]] = {
    "gated": {"method": "gated"},
    "hard": {"method": "gated", "gate": "hard"},
    "gated-deep": {"method": "gated-deep"},
    "spt-deep": {"method": "spt-deep"},
    "vpt-shallow": {"method": "vpt-shallow"},
}


def recipe(first_block: FirstBlock = 1, **settings: Any) -> Recipe:
    return make_recipe("adamw", prompts=3, epochs=2, batch_size=8, first_block=first_block, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_is_what_is_served(tiny: Backbone, colours: Path, tmp_path: Path, name: str) -> None:
    """Answers of the engine, alone and in a batch with prompts that enter the first block, by the plain reference."""
    train_adapter(tiny, TrainingJob("late", str(colours), tmp_path, recipe(**METHODS[name])), Recorder(), World())
    store = AdapterStore(tmp_path)
    store.publish(make_adapter(tiny.spec, "other", prompts=5))
    adapter = store.load("late").adapter
    assert adapter.first_block == 1
    image = open_dataset(str(colours), 0).test[0].read()
    pixels = center_crop(resize(decode(image), PREPROCESS), PREPROCESS)
    mean, std = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
    expected = reference.forward(
        tiny.model,
        normalize(pixels[None], mean, std)[0],
        pool="mean",
        head_weight=adapter.head_weight,
        head_bias=adapter.head_bias,
        prompt=adapter.prompt,
        gamma=adapter.gamma,
        tau=adapter.tau,
        first_block=1,
    )
    for tasks in (["late"], ["other", "late"]):
        answer = Engine(tiny, store).predict([(task, image) for task in tasks])[-1]
        assert isinstance(answer, Prediction)
        torch.testing.assert_close(answer.probabilities, expected.logits.softmax(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("deep", [False, True])
def test_hard_gates_are_drawn_for_the_blocks_that_have_them(tiny: Backbone, deep: bool) -> None:
    """Image by image against the plain reference, with the gates that were drawn."""
    tensors = random_tensors("gated-deep" if deep else "gated", 3, 24, first_block=1) | {"gamma": torch.tensor([0.2])}
    module = AdapterModule(tiny.spec, nn.Linear(24, 3), **tensors, hard=True).train()
    images = random_images(8)
    torch.manual_seed(3)
    logits = module(tiny.model, images)
    torch.manual_seed(3)
    gates = sample_gates(tensors["gamma"], 8, module.gumbel_temperature)
    assert len(gates.unique(dim=0)) > 1
    for image, gate, actual in zip(images, gates, logits, strict=True):
        drawn = {"gamma": torch.where(gate > 0.5, torch.inf, -torch.inf)}
        head = {"head_weight": module.head.weight, "head_bias": module.head.bias}
        expected = reference.forward(tiny.model, image, pool="mean", **head, **tensors | drawn)
        torch.testing.assert_close(actual, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("gated", 3 * 24 + 1 + 3 + 25 * 3),
        ("gated-deep", 2 * 3 * 24 + 1 + 3 + 25 * 3),
        ("vpt-deep", 2 * 3 * 24 + 25 * 3),
        ("vpt-shallow", 3 * 24 + 25 * 3),
    ],
)
def test_blocks_before_it_have_no_parameters(tiny: Backbone, method: str, expected: int) -> None:
    module = build_module(tiny, recipe(method=method), 3)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


def test_prompts_start_as_tokens_of_the_block_that_they_enter(tiny: Backbone, colours: Path) -> None:
    view = View(open_dataset(str(colours), 0).train[:6], PREPROCESS, None, "none", 0)
    layers = list(patch_tokens(tiny, torch.stack([view[index][0] for index in range(6)]), view.preprocess))
    found = prompts_from_tokens(tiny, view, "tokens", (2, 5), first_block=1, seed=0, workers=0)
    for prompt, tokens in zip(found, layers[1:], strict=True):
        distance = (prompt[:, None] - tokens.flatten(0, 1)).abs().amax(dim=2)
        assert distance.min(dim=1).values.max() < 1e-5


def test_blocks_that_are_not_there_are_refused(tiny: Backbone) -> None:
    with pytest.raises(UsageError, match="--first-block 3: the backbone's last block is 2"):
        build_module(tiny, recipe(3), 3)
    for block in (1, "auto"):
        with pytest.raises(UsageError, match=f"--first-block {block}: the method linear has no prompts"):
            recipe(block, method="linear")
    with pytest.raises(UsageError, match="--first-block must lie between 0"):
        dataclasses.replace(recipe(), first_block=-1)


@pytest.mark.parametrize(("best", "expected"), [(1, 2), (2, 3), (3, 3)])
def test_prompts_enter_behind_the_block_with_the_best_features(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int, expected: int
) -> None:
    backbone = tiny_backbone(depth=4)
    for module in (taps, fit):
        monkeypatch.setattr(module, "candidates", lambda _: tuple(Tap(block, "cls") for block in (3, 2, 1)))
    monkeypatch.setattr(taps._Search, "loss", lambda _, chosen: 1.0 - (chosen == [3 - best]))
    recorder = Recorder()
    train_adapter(backbone, TrainingJob("late", str(colours), tmp_path, recipe("auto")), recorder, World())
    adapter = AdapterStore(tmp_path).load("late").adapter
    assert adapter.first_block == expected and adapter.taps == ()
    assert f"prompts enter block {expected} of 4, counted from 0" in recorder.notices
    assert adapter.training["recipe"]["first_block"] == "auto"


def test_inspection_counts_from_the_first_block(tiny: Backbone) -> None:
    fields = {"gamma": None, "tau": None} | random_tensors("gated", 3, 24, first_block=1)
    found = inspect_adapter(make_adapter(tiny.spec, **fields))
    assert found.gates == [0.0, pytest.approx(fields["gamma"].sigmoid().item())]
    assert found.selection_ratio == [0.0, 1.0]
    assert found.temperatures is not None and len(found.temperatures) == 3


@pytest.mark.slow
def test_a_graph_of_its_own_but_no_place_in_a_shared_one(tiny: Backbone, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    fields = {"gamma": None, "tau": None} | random_tensors("gated", 3, 24, first_block=2)
    store.publish(make_adapter(tiny.spec, "late", **fields))
    store.publish(make_adapter(tiny.spec, "early"))
    result = export_task(tiny, store, "late", tmp_path / "late.onnx", ExportOptions())
    assert result["verification"]["max_abs_difference"] <= 1e-5
    with pytest.raises(ExportError, match="the prompts of 'late' enter block 2, not the first: export it alone"):
        export_tasks(tiny, store, ["late", "early"], tmp_path / "many.onnx", ExportOptions())
    assert not (tmp_path / "many.onnx").exists()
