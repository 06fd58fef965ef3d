"""Tasks whose images have several labels: from the table to the answer."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from torchmetrics.functional.classification import multilabel_average_precision

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.evaluate import evaluate_task
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.answers import LabelAnswers, average_precisions
from gpt_serve.train.calibration import fit_temperature
from gpt_serve.train.conclusion import best_thresholds
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import Silent, TrainingJob
from gpt_serve.train.methods.logistic import logistic_head
from gpt_serve.train.objective import loss_sum, right_sum
from gpt_serve.train.recipes.recipe import make_recipe
from gpt_serve.train.report import label_report

COLOURS = {"blue": (40, 60, 230), "green": (40, 210, 60), "red": (230, 50, 40)}


def write_spots(root: Path, count: int, seed: int) -> None:
    """Grey pictures in which halves, thirds or all are of one to three colours, which are their labels."""
    rng = random.Random(seed)
    root.mkdir(parents=True)
    with open(root / "labels.csv", "w", newline="", encoding="utf-8") as file:
        for index in range(count):
            names = rng.sample(sorted(COLOURS), rng.randint(1, 3))
            image = Image.new("RGB", (24, 24), (120, 120, 120))
            draw = ImageDraw.Draw(image)
            for place, name in enumerate(names):
                shade = tuple(max(0, min(255, value + rng.randint(-25, 25))) for value in COLOURS[name])
                draw.rectangle((8 * place, 0, 8 * place + 7, 23), fill=shade)
            image.save(root / f"{index}.png")
            csv.writer(file).writerow([f"{index}.png", *names])


@pytest.fixture(scope="module")
def spots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spots")
    for seed, (split, count) in enumerate((("train", 60), ("val", 30), ("test", 30))):
        write_spots(root / split, count, seed)
    return root


@pytest.fixture(scope="module")
def trained(bundled: Backbone, spots: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    adapters = tmp_path_factory.mktemp("adapters")
    recipe = make_recipe("adamw", method="linear", epochs=1, warmup=0, batch_size=16, head_init="lda", select="loss")
    summary = train_adapter(bundled, TrainingJob("spots", str(spots), adapters, recipe), Silent(), World())
    assert summary is not None
    return adapters, summary


def drawn(count: int = 400, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, torch.bernoulli(torch.sigmoid(logits), generator=generator).long()


def test_the_loss_is_that_of_each_label_by_itself() -> None:
    logits, targets = drawn(3)
    plain = -(targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log()).sum()
    assert loss_sum(logits, targets).item() == pytest.approx(plain.item(), rel=1e-5)
    assert right_sum(logits, targets).item() == pytest.approx(((logits > 0).long() == targets).double().mean(1).sum())


def test_mean_average_precision_is_that_of_torchmetrics() -> None:
    logits, targets = drawn()
    expected = multilabel_average_precision(logits.sigmoid(), targets, num_labels=6, average="none")
    torch.testing.assert_close(average_precisions(logits, targets), expected.double(), rtol=1e-5, atol=1e-5)
    assert average_precisions(logits[:, :1], torch.zeros(400, 1)).isnan().all()


def test_the_temperature_of_labels_is_found() -> None:
    logits, targets = drawn(3000)
    assert fit_temperature(4 * logits, targets) == pytest.approx(4, rel=0.06)


def test_thresholds_have_the_best_f1() -> None:
    scores = torch.tensor([[0.9, 0.2], [0.6, 0.3], [0.5, 0.1], [0.1, 0.05]])
    targets = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0]])
    assert best_thresholds(scores, targets).tolist() == pytest.approx([0.6, 0.5])


def test_the_head_from_logistic_regression_is_that_of_its_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 500, 8, generator=generator) * torch.tensor([1.0, 5, 0.1, 1, 1, 1, 1, 0]) + 3
    truth = torch.randn(8, 3, generator=generator)
    targets = ((features[0] - 3) @ truth + 0.3 * torch.randn(500, 3, generator=generator) > 0.5).long()
    weight, bias = logistic_head(features, targets)
    assert (((features[0] @ weight.T + bias) > 0).long() == targets).double().mean() > 0.93


def test_training_gives_labels_that_the_engine_answers_with(
    bundled: Backbone, spots: Path, trained: tuple[Path, dict[str, object]]
) -> None:
    adapters, summary = trained
    metrics = summary["metrics"]
    assert isinstance(metrics, dict) and metrics["test_map"] > 0.95
    adapter = AdapterStore(adapters).load("spots").adapter
    assert adapter.threshold is not None and adapter.labels == ("blue", "green", "red") and adapter.unknown is not None
    card = (adapters / "spots" / "README.md").read_text()
    assert "| label | average precision | threshold |" in card and "confusion" not in card
    with Engine(bundled, AdapterStore(adapters)) as engine:
        image = (spots / "test" / "0.png").read_bytes()
        (answer,) = engine.predict([("spots", image)])
        assert isinstance(answer, Prediction) and answer.thresholds is not None
        named = {
            label
            for label, value in zip(answer.labels, answer.probabilities, strict=True)
            if value >= answer.thresholds[answer.labels.index(label)]
        }
        assert {label for label, _ in answer.listed()} == named
        assert [label for label, _ in answer.listed(3)] == [label for label, _ in answer.top(3)]
        assert [item["label"] for item in answer.to_dict()["predictions"]] == [label for label, _ in answer.listed()]
        found = evaluate_task(engine, "spots", str(spots))
        assert found["map"] == pytest.approx(metrics["test_map"], abs=1e-6) and found["n"] == 30


def test_mixed_with_a_task_of_classes_both_answer_as_alone(
    bundled: Backbone, spots: Path, trained: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path)
    adapter = AdapterStore(trained[0]).load("spots").adapter
    store.publish(adapter)
    store.publish(type(adapter)(**{**vars(adapter), "task": "classes", "threshold": None}))
    image = (spots / "test" / "1.png").read_bytes()
    with Engine(bundled, store) as engine:
        labels, classes = engine.predict([("spots", image), ("classes", image)])
        assert isinstance(labels, Prediction) and isinstance(classes, Prediction)
        assert classes.probabilities.sum().item() == pytest.approx(1) and classes.thresholds is None
        odds = labels.probabilities / (1 - labels.probabilities)
        torch.testing.assert_close(classes.probabilities, odds / odds.sum(), rtol=0.01, atol=0.002)
        with pytest.raises(UsageError, match="several labels an image, 'classes' answers with one"):
            evaluate_task(engine, "classes", str(spots))


def test_the_commands_list_labels_above_their_threshold(spots: Path, trained: tuple[Path, dict[str, object]]) -> None:
    common = ["--task", "spots", "--adapters", str(trained[0]), "--backbone", "mae-vit-tiny-32", "--device", "cpu"]
    image = str(spots / "test" / "0.png")
    done = CliRunner().invoke(main, ["predict", *common, image, "--json"], catch_exceptions=False)
    (entry,) = json.loads(done.stdout)["images"]
    done = CliRunner().invoke(main, ["predict", *common, image, "--json", "--top-k", "3"], catch_exceptions=False)
    (every,) = json.loads(done.stdout)["images"]
    assert entry["predictions"] == every["predictions"][: len(entry["predictions"])] and len(every["predictions"]) == 3
    done = CliRunner().invoke(main, ["eval", *common, "--data", str(spots)], catch_exceptions=False)
    assert "spots: mean average precision" in done.stdout


def test_the_report_has_a_row_for_each_label() -> None:
    logits, targets = drawn(50, 2)
    answers = LabelAnswers(torch.sigmoid(logits)[None], targets)
    lines = label_report(answers, ("a", "b"), "test", torch.full((2,), 0.5))
    assert "On 50 test images:" in lines and sum(line.startswith(("| a |", "| b |")) for line in lines) == 2
    assert set(answers.metrics) == {"accuracy", "map"}
