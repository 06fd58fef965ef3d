"""Folders of pictures and label files: their spellings, and one line for whatever is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt_serve.errors import DataError
from gpt_serve.train.masks.samples import NOTHING, label_ids
from gpt_serve.train.masks.scan import count_lines, scan_masks
from gpt_serve.train.masks.sources import find_kind, open_mask_test, open_masks
from tests.train.masks.conftest import CLASSES, VOID, scene, write_scenes


@pytest.mark.parametrize(
    ("labels", "splits"),
    [
        ("labels", ("train", "val", "test")),
        ("annotations", ("training", "validation", "testing")),
        ("masks", ("Train", "valid", "test")),
    ],
)
def test_all_spellings_of_folders(tmp_path: Path, labels: str, splits: tuple[str, ...]) -> None:
    write_scenes(tmp_path, dict(zip(splits, (3, 2, 1), strict=True)), labels)
    dataset = open_masks(str(tmp_path), 0, (VOID,))
    assert find_kind(str(tmp_path)) == "segmentation"
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [3, 2, 1]
    assert dataset.labels == CLASSES
    expected = scene(0)[1].astype(int)
    expected[expected == VOID] = NOTHING
    assert (label_ids(dataset.train[0], dataset.table) == expected).all()


def test_validation_pictures_are_held_out_by_seed(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"train": 10})
    first, again, other = (open_masks(str(tmp_path), seed, (VOID,)) for seed in (0, 0, 1))
    assert (len(first.train), len(first.val)) == (8, 2)
    names = [[sample.name for sample in dataset.val] for dataset in (first, again, other)]
    assert names[0] == names[1] != names[2]
    assert not {sample.name for sample in first.val} & {sample.name for sample in first.train}


@pytest.mark.parametrize(
    "content",
    [["sky", "grass", "wall"], {"0": "sky", "1": "grass", "2": "wall"}, {"2": "wall", "1": "grass", "0": "sky"}],
)
def test_classes_from_json(tmp_path: Path, content: object) -> None:
    write_scenes(tmp_path, {"train": 2})
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert open_masks(str(tmp_path), 0, (VOID,)).labels == CLASSES


def test_classes_that_start_elsewhere_become_ids_from_0(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"train": 2})
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_text(json.dumps({"1": "grass", "2": "wall"}))
    dataset = open_masks(str(tmp_path), 0, (0, VOID))
    ids = label_ids(dataset.train[0], dataset.table)
    assert dataset.labels == ("grass", "wall") and set(np.unique(ids)) == {0, 1, NOTHING}


def test_ade20k_is_known_by_its_table(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"training": 3, "validation": 1}, "annotations")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t.1\t1\t1\tsky\n")
    dataset = open_masks(str(tmp_path), 0)
    assert dataset.labels == ("wall", "sky") and dataset.ignore == (0,)
    assert dataset.table[:3].tolist() == [NOTHING, 0, 1]


def test_indexed_label_files_are_read_by_index(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"train": 2})
    path = tmp_path / "labels" / "train" / "00.png"
    image = Image.open(path)
    image.putpalette([index % 7 for index in range(768)])
    image.save(path)
    dataset = open_masks(str(tmp_path), 0, (VOID,))
    expected = scene(0)[1].astype(int)
    expected[expected == VOID] = NOTHING
    ids = [
        label_ids(sample, dataset.table) for sample in (*dataset.train, *dataset.val) if sample.name.endswith("00.jpg")
    ]
    assert (ids[0] == expected).all()


def check(root: Path) -> None:
    dataset = open_masks(str(root), 0, (VOID,))
    scan_masks(dataset, [*dataset.train, *dataset.val, *dataset.test], True, lambda: None)


def save(root: Path, name: str, array: np.ndarray) -> None:
    Image.fromarray(array).save(root / name)


TROUBLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "label file missing": (
        lambda root: (root / "labels/train/01.png").unlink(),
        "1 name without a label file in .*: 01; add",
    ),
    "picture missing": (lambda root: (root / "images/train/01.jpg").unlink(), "1 name without a picture in .*: 01"),
    "folder missing": (lambda root: (root / "images/val").mkdir(), "no folder .*labels/val for the label files"),
    "16 bits": (
        lambda root: save(root, "labels/train/01.png", np.zeros((24, 32), np.uint16)),
        r"01.png \(it has 16 bits: save it with 8",
    ),
    "colours": (
        lambda root: save(root, "labels/train/01.png", np.zeros((24, 32, 3), np.uint8)),
        r"01.png \(it is a picture in colours \(RGB\)",
    ),
    "another size": (
        lambda root: save(root, "labels/train/01.png", np.zeros((24, 30), np.uint8)),
        r"of another size than their picture: .*01.png \(30 x 24, not 32 x 24\)",
    ),
    "unknown value": (
        lambda root: save(root, "labels/train/01.png", np.full((24, 32), 7, np.uint8)),
        r"values that are none of the 3 classes .*01.png \(7\)",
    ),
    "no PNG": (
        lambda root: (root / "labels/train/01.png").write_bytes((root / "images/train/00.jpg").read_bytes()),
        "label files are indexed or grey PNGs",
    ),
    "damaged picture": (
        lambda root: (root / "images/train/01.jpg").write_bytes(b"\xff\xd8\xff"),
        "1 label file whose picture cannot be read",
    ),
    "no names": (
        lambda root: (root / "classes.txt").unlink(),
        r"found 0, 1, 2\): write .*classes.txt with a line for each class",
    ),
    "wrong names": (lambda root: (root / "classes.json").write_text('{"a": 1}'), "expected a list of names"),
    "no training": (lambda root: (root / "images/train").rename(root / "images/test"), "no folder .*labels/test"),
    "nothing": (lambda root: [path.unlink() for path in root.glob("*/train/*")], "no pictures in images/train"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    write_scenes(tmp_path, {"train": 3})
    check(tmp_path)
    spoil, message = TROUBLE[name]
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as refusal:
        check(tmp_path)
    assert "\n" not in str(refusal.value)


def test_several_troubles_are_all_told(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"train": 3})
    TROUBLE["16 bits"][0](tmp_path)
    save(tmp_path, "labels/train/02.png", np.full((9, 9), 7, np.uint8))
    with pytest.raises(DataError, match=r"1 label file that cannot.*1 label file with values.*1 label file of another"):
        check(tmp_path)


def test_class_folders_given_as_masks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "cats").mkdir(parents=True)
    assert find_kind(str(tmp_path)) == "classification"
    with pytest.raises(DataError, match="expected images/train/.* with labels/train"):
        open_masks(str(tmp_path), 0)


def test_evaluation_maps_names_to_the_adapters_ids(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"test": 2})
    dataset = open_mask_test(str(tmp_path), ("wall", "tree", "grass", "sky"), (VOID,))
    assert dataset.table[:3].tolist() == [3, 2, 0] and dataset.ignore == (VOID,)
    with pytest.raises(DataError, match="classes that training did not see: wall"):
        open_mask_test(str(tmp_path), ("sky", "grass"), (VOID,))


def test_counts_are_of_pixels_with_a_class(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"train": 2, "val": 1})
    dataset = open_masks(str(tmp_path), 0, (VOID,))
    found = scan_masks(dataset, dataset.train, True, lambda: None)
    values = np.concatenate([scene(0)[1].ravel(), scene(1)[1].ravel()])
    assert sum(item.pixels for item in found).tolist() == [(values == value).sum() for value in range(3)]
    (line,) = count_lines(dataset.labels, {"train": found, "val": []})
    assert line.startswith("train: 2 pictures, pixels: ")
