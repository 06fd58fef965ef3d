"""A short real training run on real images with the bundled backbone."""

from dataclasses import replace
from pathlib import Path

import pytest

from gpt_serve.model.backbone import Backbone
from gpt_serve.train import fit
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.recipes.recipe import make_recipe
from tests.train.conftest import Recorder


@pytest.mark.slow
def test_an_epoch_on_a_few_hundred_digits_reaches_an_accuracy_floor(
    bundled: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_dataset("digits", 0)
    few = replace(whole, train=whole.train[::4], val=whole.val[::4], test=whole.test[::2])
    monkeypatch.setattr(fit, "open_dataset", lambda *_: few)
    recipe = make_recipe("adamw", prompts=4, epochs=1, warmup=0, batch_size=8, augment="none", norm="standard")
    summary = train_adapter(bundled, TrainingJob("digits", "digits", tmp_path, recipe), Recorder(), World())
    assert summary is not None and summary["data"]["train"] == len(few.train) < 300
    # Chance is 10 %; a gradient that does not reach the head, or a wrong label order, stays near it.
    assert summary["metrics"]["test_accuracy"] > 0.75
