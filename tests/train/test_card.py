"""The model card: the confusion picture of few and of many classes, in any script."""

from pathlib import Path
from typing import Any

import matplotlib.axes
import pytest
import torch
from PIL import Image

from gpt_serve.train.card import MOST_CLASSES, confusion_shares, most_confused, plot_confusion


def some_answers(classes: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, classes, (count,), generator=generator)
    guesses = torch.randint(0, classes, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.7, targets, guesses), targets


def test_shares_are_counted() -> None:
    predictions, targets = some_answers(5, 200)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for predicted, true in zip(predictions.tolist(), targets.tolist(), strict=True):
        expected[true, predicted] += 1 / targets.tolist().count(true)
    everything = confusion_shares(predictions, targets, 5, torch.arange(5))
    assert torch.allclose(everything, expected)
    some = torch.tensor([1, 3])
    assert torch.allclose(confusion_shares(predictions, targets, 5, some), expected[some][:, some])


def test_the_most_confused_classes_are_those_of_the_most_mistakes() -> None:
    predictions, targets = some_answers(50, 2000)
    mistakes = [0] * 50
    for predicted, true in zip(predictions.tolist(), targets.tolist(), strict=True):
        for one in (predicted, true) if predicted != true else ():
            mistakes[one] += 1
    chosen = most_confused(predictions, targets, 50, 10).tolist()
    assert chosen == sorted(chosen) and len(chosen) == 10
    assert min(mistakes[one] for one in chosen) >= max(mistakes[one] for one in range(50) if one not in chosen)
    assert most_confused(predictions, targets, 50, 60).tolist() == list(range(50))


def test_classes_without_images_have_empty_rows() -> None:
    shares = confusion_shares(torch.tensor([0]), torch.tensor([0]), 3, torch.arange(3))
    assert shares.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_many_classes_take_the_memory_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 100,000 classes would have 80 GB."""
    titles: list[str] = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", lambda self, title: titles.append(title))
    labels = [f"class {number}" for number in range(100_000)]
    plot_confusion(*some_answers(100_000, 1000), labels, "many", tmp_path / "many.png")
    assert titles == [f"many, the {MOST_CLASSES} of 100000 classes with the most mistakes"]
    with Image.open(tmp_path / "many.png") as image:
        assert max(image.size) <= 14 * 120


def test_names_that_the_font_lacks_are_numbers_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    set_xticks = matplotlib.axes.Axes.set_xticks

    def keep(self: Any, ticks: Any, labels: list[str], **options: Any) -> Any:
        drawn.append(labels)
        return set_xticks(self, ticks, labels, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_xticks", keep)
    labels = ["caf\u00e9", "\u82b1", "5 $", "\u0420\u043e\u0437\u0430"]
    plot_confusion(*some_answers(4, 50), labels, "scripts", tmp_path / "scripts.png")
    assert drawn == [["caf\u00e9", "#1", "5 \\$", "\u0420\u043e\u0437\u0430"]]
