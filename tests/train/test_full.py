"""Full fine-tuning: trained and evaluated, never served."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.images.preprocess import normalize
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import block
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import Trainer
from gpt_serve.train.methods.modules import FullModule
from gpt_serve.train.recipes.recipe import Recipe, make_recipe
from tests.tiny_vit import PREPROCESS, random_images, tiny_vit
from tests.train.conftest import Recorder


def recipe(epochs: int = 4, **settings: object) -> Recipe:
    return make_recipe("full", epochs=epochs, warmup=0, batch_size=8, lr=3e-3, **settings)


def test_it_learns_and_is_stored_but_not_served(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    summary = train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, recipe(8)), Recorder(), World())
    assert summary is not None
    assert summary["metrics"]["test_accuracy"] >= 0.9
    assert AdapterStore(tmp_path).tasks() == []
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    path = tmp_path / ".full" / "colours.safetensors"
    assert summary["path"] == str(path) and "revision" not in summary
    assert [item.name for item in path.parent.iterdir()] == [path.name]

    # timm alone, with the stored weights, is as accurate as was reported.
    weights = load_file(path)
    classifier = tiny_vit(num_classes=3)
    classifier.load_state_dict(weights)
    # timm norms before it pools: take its tokens, and do as MAE does.
    mean, std = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
    samples = open_dataset(str(colours), 0).test
    view = View(samples, PREPROCESS, None, "none", 0)
    images = normalize(torch.stack([view[index][0] for index in range(len(view))]), mean, std)
    norm, classifier.norm = classifier.norm, torch.nn.Identity()
    with torch.no_grad():
        logits = classifier.eval().head(norm(classifier.forward_features(images)[:, 1:].mean(1)))
    accuracy = (logits.argmax(1) == torch.tensor([sample.target for sample in samples])).double().mean().item()
    assert accuracy == summary["metrics"]["test_accuracy"]
    with safe_open(path, "pt") as stored:
        assert json.loads(stored.metadata()["labels"]) == ["blue", "green", "red"]
        assert json.loads(stored.metadata()["training"])["metrics"] == summary["metrics"]


def test_everything_is_trained(tiny: Backbone) -> None:
    module = build_module(tiny, recipe(), 3)
    assert isinstance(module, FullModule)
    backbone = sum(parameter.numel() for parameter in tiny.model.parameters())
    assert sum(parameter.numel() for parameter in module.parameters()) == backbone + 25 * 3
    module(tiny.model, random_images(2)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert len(module.steering()) + 2 == len(list(module.parameters()))


def test_an_interrupted_run_resumes_to_the_same_weights(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_adapter(tiny, TrainingJob("colours", str(colours), whole, recipe()), Recorder(), World())
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tiny, TrainingJob("colours", str(colours), parts, recipe()), Recorder(interrupt_at=2), World())
    assert not (parts / ".full").exists()
    train_adapter(tiny, TrainingJob("colours", str(colours), parts, recipe(), resume=True), Recorder(), World())
    one, other = (load_file(path / ".full" / "colours.safetensors") for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_its_first_step_is_that_of_a_plain_model(tiny: Backbone, colours: Path) -> None:
    """One step of AdamW on timm's own model."""
    settings = make_recipe("full", epochs=1, warmup=0, batch_size=6, lr=3e-3)
    view = View(open_dataset(str(colours), 0).train[::5], PREPROCESS, None, "none", 0)
    module = build_module(tiny, settings, 3)
    plain = build_module(tiny, settings, 3)
    plain.load_state_dict(module.state_dict())
    Trainer(tiny, module, settings, train=view, val=view, world=World(), inputs=Inputs(0)).fit(
        lambda *_: None, lambda _: None
    )

    assert isinstance(plain, FullModule)
    mean, std = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
    images = normalize(torch.stack([view[index][0] for index in range(len(view))]), mean, std)
    targets = torch.tensor([view[index][1] for index in range(len(view))])
    tokens = plain.model.embed(images)
    for blk in plain.model.blocks:
        tokens = block(blk, tokens, None, None)
    logits = plain.head(plain.model.norm(tokens[:, 1:].mean(1)))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.05)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    optimizer.step()
    for (name, actual), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        # Adam's first step is the sign of the gradient: where that is tiny, rounding decides.
        gradient = expected.grad
        assert gradient is not None
        clear = gradient.abs() > 1e-5
        torch.testing.assert_close(actual[clear], expected[clear], atol=1e-5, rtol=1e-4, msg=name)


def test_settings_that_it_does_not_have(tiny: Backbone) -> None:
    for settings in ({"norm": "fresh"}, {"temperature": True}):
        with pytest.raises(UsageError, match="--method full"):
            recipe(**settings)
    with pytest.raises(UsageError, match="the method full learns no gates"):
        recipe(gate="hard")
