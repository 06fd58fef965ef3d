"""Probabilities after calibration: they mean what they say, and the order of answers stays."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.errors import DataError, UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.answers import logits_of
from gpt_serve.train.calibration import BINS, calibrate, calibration_error, fit_temperature
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import load_views, train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Silent, TrainingJob
from gpt_serve.train.published import PublishedJob, calibrate_published, module_of
from gpt_serve.train.recipes.recipe import make_recipe

RECIPE = make_recipe("adamw", method="linear", epochs=2, warmup=0, batch_size=8, head_init="lda")


pytestmark = pytest.mark.usefixtures("no_plots")


def drawn(temperature: float, count: int = 4000, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right about the classes they were drawn from once they are divided by ``temperature``."""
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(count, classes, generator=generator)
    targets = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    return temperature * honest, targets


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_the_temperature_that_made_logits_overconfident_is_found(temperature: float) -> None:
    logits, targets = drawn(temperature)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(temperature, rel=0.06)
    grid = torch.linspace(-3, 3, 1201).exp().tolist()
    best = min(grid, key=lambda value: F.cross_entropy(logits / value, targets).item())
    assert found == pytest.approx(best, rel=0.01)


def test_images_that_are_all_classified_right_do_not_ask_for_certainty() -> None:
    targets = torch.arange(4).repeat(25)
    assert fit_temperature(F.one_hot(targets, 4).float(), targets) == 1


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    logits, targets = drawn(3.0, count=700)
    probabilities = logits.softmax(1)
    confidences, predictions = probabilities.max(1)
    expected = multiclass_calibration_error(probabilities, targets, num_classes=5, n_bins=BINS, norm="l1")
    assert calibration_error(confidences, predictions == targets) == pytest.approx(expected.item(), abs=1e-6)
    assert calibration_error(torch.ones(3), torch.tensor([True, True, False])) == pytest.approx(1 / 3)


def test_training_calibrates_and_records_it(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    summary = train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, RECIPE), Silent(), World())
    assert summary is not None
    record = summary["calibration"]
    adapter = AdapterStore(tmp_path).load("colours").adapter
    assert adapter.training["calibration"] == record
    job = TrainingJob("colours", str(colours), tmp_path, RECIPE)
    views = load_views(open_dataset(str(colours), 0), adapter.preprocess, job, Silent())
    assert views.test is not None and record["split"] == "test" and record["measured_on"] == len(views.test)
    module = module_of(tiny, adapter)
    assert fit_temperature(*logits_of(tiny, module, views.val, Inputs(0))) == pytest.approx(1, rel=1e-3)
    logits, targets = logits_of(tiny, module, views.test, Inputs(0))
    confidences, predictions = logits.softmax(1).max(1)
    assert record["error_after"] == pytest.approx(calibration_error(confidences, predictions == targets), abs=1e-6)
    confidences = (logits * record["temperature"]).softmax(1).max(1).values
    assert record["error_before"] == pytest.approx(calibration_error(confidences, predictions == targets), abs=1e-4)
    assert "expected calibration error (15 bins" in (tmp_path / "colours" / "README.md").read_text()


def test_a_final_fit_has_no_images_to_calibrate_with(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    recipe = make_recipe("adamw", method="linear", epochs=1, warmup=0, final_fit=True)
    summary = train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, recipe), Silent(), World())
    assert summary is not None and "calibration" not in summary
    with pytest.raises(UsageError, match="was fitted to the validation images"):
        calibrate_published(tiny, PublishedJob("colours", str(colours), tmp_path), Silent())


def test_calibration_keeps_the_order_of_answers(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, RECIPE), Silent(), World())
    adapter = AdapterStore(tmp_path).load("colours").adapter
    job = TrainingJob("colours", str(colours), tmp_path, RECIPE)
    views = load_views(open_dataset(str(colours), 0), adapter.preprocess, job, Silent())
    module = module_of(tiny, adapter)
    with torch.no_grad():
        module.head.weight.mul_(40)  # far too sure
    before, _ = logits_of(tiny, module, views.val, Inputs(0))
    calibrate(tiny, module, views.val, views.unseen, Inputs(0))
    after, _ = logits_of(tiny, module, views.val, Inputs(0))
    assert torch.equal(before.argsort(1), after.argsort(1))


def test_a_published_adapter_is_calibrated_by_a_command_and_again_to_the_same(
    bundled: Backbone, colours: Path, tmp_path: Path
) -> None:
    adapters = tmp_path / "adapters"
    first = train_adapter(bundled, TrainingJob("colours", str(colours), adapters, RECIPE), Silent(), World())
    assert first is not None
    store = AdapterStore(adapters)
    stored = store.load("colours").adapter
    noise = torch.randn(stored.head_weight.shape, generator=torch.Generator().manual_seed(0))
    sure = {"head_weight": 30 * noise, "head_bias": 0 * stored.head_bias}  # often wrong, and always certain
    training = {key: value for key, value in stored.training.items() if key != "calibration"}
    store.publish(type(stored)(**{**vars(stored), **sure, "training": training}))
    args = ["calibrate", "--task", "colours", "--data", str(colours), "--adapters", str(adapters)]
    args += ["--backbone", "mae-vit-tiny-32", "--device", "cpu"]
    ran = CliRunner().invoke(main, [*args, "--json"], catch_exceptions=False)
    record = json.loads(ran.stdout)["calibration"]
    assert record["temperature"] > 10 and record["error_after"] < record["error_before"] / 2
    calibrated = store.load("colours").adapter
    assert torch.allclose(calibrated.head_weight, 30 * noise / record["temperature"], rtol=1e-4)
    again = CliRunner().invoke(main, args, catch_exceptions=False)
    assert "calibration error on" in again.stdout
    second = store.load("colours").adapter.training["calibration"]
    assert second.pop("split") == record.pop("split") == "test"
    assert second == pytest.approx(record, rel=0.01, abs=1e-4)


def test_other_images_than_those_of_training_are_refused(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, RECIPE), Silent(), World())
    with pytest.raises(DataError, match="is not what 'colours' was trained on"):
        calibrate_published(tiny, PublishedJob("colours", "digits", tmp_path), Silent())
