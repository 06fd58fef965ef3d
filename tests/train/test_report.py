"""What the card tells of classes and images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.model.backbone import Backbone
from gpt_serve.train import label_errors
from gpt_serve.train.answers import Answers
from gpt_serve.train.data.duplicates import Pair, duplicate_line, near_duplicates, thumbnail
from gpt_serve.train.data.samples import Sample
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.label_errors import (
    HINT,
    LabelError,
    label_error_line,
    left_out_probabilities,
    probable_label_errors,
)
from gpt_serve.train.recipes.recipe import make_recipe
from gpt_serve.train.report import class_report, confused_pairs, data_report
from tests.train.conftest import Recorder, write_colours

RECIPE = make_recipe("adamw", method="linear", epochs=0, warmup=0, head_init="lda")


def answers(targets: list[int], predictions: list[int]) -> Answers:
    return Answers(torch.tensor(predictions), torch.tensor(targets), torch.ones(1, len(targets)))


def samples(count: int, targets: list[int] | None = None, split: str = "train") -> list[Sample]:
    return [
        Sample(f"/somewhere/{split}/class/{index}.png", lambda: b"", 0 if targets is None else targets[index])
        for index in range(count)
    ]


# Classes


def test_each_class_has_its_precision_recall_and_f1() -> None:
    lines = class_report(answers([0, 0, 0, 1, 1], [0, 0, 1, 1, 0]), ("a|b", "bee", "none"), "test")
    assert "On 5 test images:" in lines
    assert r"| a\|b | 0.667 | 0.667 | 0.667 | 3 |" in lines
    assert "| bee | 0.500 | 0.500 | 0.500 | 2 |" in lines
    assert "| none | 0.000 | 0.000 | 0.000 | 0 |" in lines


def test_pairs_that_are_confused_most_come_first() -> None:
    found = answers([0, 0, 1, 2, 2, 2], [1, 1, 0, 0, 2, 2])
    assert confused_pairs(found.predictions, found.targets, 3, 10) == [(0, 1, 2), (1, 0, 1), (2, 0, 1)]
    assert "| a | b | 2 of 2 |" in class_report(found, ("a", "b", "c"), "test")
    assert "Confused most often:" not in class_report(answers([0, 1], [0, 1]), ("a", "b"), "test")


def test_of_very_many_classes_the_worst_have_a_row() -> None:
    count = 500
    targets = list(range(count))
    predictions = [*range(count - 1), 0]
    lines = class_report(answers(targets, predictions), tuple(f"c{index}" for index in range(count)), "test")
    assert "the 120 of 500 classes with the lowest F1" in lines[2] and len(lines) < 150
    assert "| c499 | 0.000 | 0.000 | 0.000 | 1 |" in lines


# Duplicates


def noise(seed: int, side: int = 40) -> torch.Tensor:
    """A picture of soft spots, uint8 (3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    spots = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(spots, (side, side), mode="bicubic").clamp(0, 1)[0]
    return (255 * smooth).to(torch.uint8)


def test_the_same_picture_in_two_splits_is_found_whatever_was_done_to_it() -> None:
    train = [noise(seed) for seed in range(30)]
    darker = (0.8 * noise(3).float() + 10).to(torch.uint8)
    smaller = torch.nn.functional.interpolate(noise(7)[None].float(), (25, 25), mode="bilinear", antialias=True)[0]
    test = [noise(100), darker, noise(101), smaller.round().to(torch.uint8)]
    thumbnails = [torch.stack([thumbnail(image) for image in images]) for images in (train, test)]
    pairs = near_duplicates({"train": (samples(30), thumbnails[0]), "test": (samples(4, split="test"), thumbnails[1])})
    assert pairs == [
        Pair("train/class/3.png", "test/class/1.png"),
        Pair("train/class/7.png", "test/class/3.png"),
    ]
    assert duplicate_line(pairs).startswith(
        "2 pairs of images of two splits look the same: train/class/3.png and test/"
    )


def test_images_of_one_colour_are_known_by_nothing() -> None:
    plain = torch.stack([thumbnail(torch.full((3, 9, 9), value, dtype=torch.uint8)) for value in (10, 10, 200)])
    assert near_duplicates({"train": (samples(3), plain), "val": (samples(3, split="val"), plain)}) == []


def test_a_long_list_is_cut_in_the_warning_and_in_the_card() -> None:
    pairs = [Pair(f"a{index}", f"b{index}") for index in range(60)]
    assert duplicate_line(pairs).endswith("a4 and b4 and 55 more, in the card")
    lines = data_report(pairs, ())
    assert "These pairs of images of two splits look the same, the first 50 of 60:" in lines
    assert "No label looks wrong." in lines and sum(line.startswith("- ") for line in lines) == 50
    assert HINT in data_report((), None)


# Label errors


def clusters(wrong: dict[int, int], count: int = 60) -> tuple[torch.Tensor, list[int]]:
    """Features of three classes that lie apart, and labels of which some are wrong."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(count) % 3
    features = 3 * torch.eye(3, 8)[truth] + 0.5 * torch.randn(count, 8, generator=generator)
    return features, [wrong.get(index, int(label)) for index, label in enumerate(truth.tolist())]


def test_wrong_labels_are_found() -> None:
    pytest.importorskip("cleanlab")
    features, targets = clusters({4: 0, 20: 1})
    found = probable_label_errors(features, samples(60, targets), ("a", "b", "c"))
    assert found is not None and set(found) == {
        LabelError("train/class/4.png", "a", "b"),
        LabelError("train/class/20.png", "b", "c"),
    }
    assert label_error_line(found).startswith("2 images may be labelled wrong: train/class/")


def test_right_labels_and_single_images_are_let_be() -> None:
    pytest.importorskip("cleanlab")
    features, targets = clusters({})
    assert probable_label_errors(features, samples(60, targets), ("a", "b", "c")) == ()
    assert probable_label_errors(features[:3], samples(3, [0, 1, 2]), ("a", "b", "c")) == ()


def test_without_cleanlab_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_errors, "find_spec", lambda name: None)
    features, targets = clusters({4: 0})
    assert probable_label_errors(features, samples(60, targets), ("a", "b", "c")) is None


def test_an_image_is_judged_by_others_alone() -> None:
    """Its own label changes what is thought of the others, not of itself."""
    features, targets = clusters({})
    before = left_out_probabilities(features, torch.tensor(targets), 3)
    after = left_out_probabilities(features, torch.tensor([(targets[0] + 1) % 3, *targets[1:]]), 3)
    assert before[0].argmax() == after[0].argmax() == targets[0]


@pytest.mark.usefixtures("no_plots")
def test_training_warns_and_the_card_tells(tiny: Backbone, tmp_path: Path) -> None:
    data, recorder = tmp_path / "data", Recorder()
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        write_colours(data, split, count, seed=len(split))
    wrong: Any = data / "train" / "red" / "0.png"
    Image.open(wrong).save(data / "test" / "red" / "copy.png")
    wrong.rename(data / "train" / "blue" / "wrong.png")
    train_adapter(tiny, TrainingJob("colours", str(data), tmp_path / "a", RECIPE), recorder, World())
    text = (tmp_path / "a" / "colours" / "README.md").read_text()
    for line in ("| class | precision | recall | F1 | images |", "- train/blue/wrong.png and test/red/copy.png"):
        assert line in text
    assert any(line.startswith("1 pair of images of two splits look the same") for line in recorder.notices)
    assert AdapterStore(tmp_path / "a").load("colours").adapter.labels == ("blue", "green", "red")
    if label_errors.find_spec("cleanlab") is not None:
        assert "train/blue/wrong.png: labelled blue, perhaps red" in text
