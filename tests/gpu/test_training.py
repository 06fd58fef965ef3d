"""Training on the device: the same seed gives the same adapter, and it learns."""

from pathlib import Path

import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.recipes.recipe import make_recipe
from tests.train.conftest import Recorder, write_colours


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    write_colours(root, "train", 12, seed=0)
    write_colours(root, "test", 4, seed=1)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gated", "vpt-deep"])
def test_the_same_seed_trains_the_same_adapter(backbone: Backbone, colours: Path, tmp_path: Path, method: str) -> None:
    recipe = make_recipe("paper", method=method, prompts=5, epochs=3, warmup=1, lr=0.02, batch_size=8)
    adapters = []
    for name in ("one", "two"):
        summary = train_adapter(
            backbone, TrainingJob("colours", str(colours), tmp_path / name, recipe), Recorder(), World()
        )
        assert summary is not None and summary["metrics"]["test_accuracy"] >= 0.75
        adapters.append(AdapterStore(tmp_path / name).load("colours").adapter)
    one, other = adapters
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None and second is None) or torch.equal(first, second), name
