"""A short real training run on real images with the bundled backbone."""

from pathlib import Path

import pytest

from gpt_serve.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import Job, train_adapter
from gpt_serve.train.recipe import make_recipe
from tests.train.conftest import Recorder


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
def test_an_epoch_of_digits_reaches_an_accuracy_floor(bundled: Backbone, tmp_path: Path) -> None:
    recipe = make_recipe("adamw", prompts=4, epochs=1, warmup=0, augment="none")
    summary = train_adapter(bundled, Job("digits", "digits", tmp_path, recipe), Recorder(), World())
    assert summary is not None
    # Chance is 10 %; a gradient that does not reach the prompts or the head, or a wrong label order, stays near it.
    assert summary["metrics"]["test_accuracy"] > 0.6
