"""Data sets of torchvision, from files in the layouts that its classes expect; nothing is downloaded."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from gpt_serve.errors import DataError
from gpt_serve.images.decode import decode
from gpt_serve.train.data.datasets import Dataset, open_dataset, open_evaluation
from gpt_serve.train.data.sources import vision
from gpt_serve.train.data.sources.published import published
from tests.train.conftest import write_pictures


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def trust_files(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let a class take files of any content for its own."""
    path = f"torchvision.datasets.{module}.check_integrity"
    monkeypatch.setattr(path, lambda file, md5=None: Path(file).is_file())


def sizes(dataset: Dataset) -> list[int]:
    return [len(split) for split in (dataset.train, dataset.val, dataset.test)]


def write_dtd(root: Path, partition: int = 1) -> Path:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        names = [f"{kind}/{kind}_{split}{index}.jpg" for kind in ("lined", "banded") for index in range(2)]
        write_pictures([folder / "images" / name for name in names])
        (folder / "labels" / f"{split}{partition}.txt").write_text("\n".join(names))
    return folder


@pytest.mark.parametrize("name", ["DTD", "torchvision:DTD", "torchvision:dtd"])
def test_published_splits_are_kept_and_files_are_handed_over(data_root: Path, name: str) -> None:
    folder = write_dtd(data_root)
    dataset = open_dataset(name, seed=0)
    assert dataset.labels == ("banded", "lined")
    assert sizes(dataset) == [4, 4, 4]
    for split, samples in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test)):
        expected = [folder / "images" / line for line in (folder / "labels" / f"{split}1.txt").read_text().split()]
        assert [sample.read() for sample in samples] == [path.read_bytes() for path in expected]
        assert [dataset.labels[sample.target] for sample in samples] == [path.parent.name for path in expected]
    found = open_evaluation(name, ("lined", "banded")).test
    assert [sample.read() for sample in found] == [sample.read() for sample in dataset.test]
    assert [sample.target for sample in found] == [0, 0, 1, 1]


def test_a_folder_of_that_name_comes_first(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dtd(data_root)
    monkeypatch.chdir(tmp_path)
    write_pictures([tmp_path / "DTD" / "train" / label / f"{index}.png" for label in "ab" for index in range(2)])
    assert open_dataset("DTD", 0).labels == ("a", "b")
    assert open_dataset("torchvision:DTD", 0).labels == ("banded", "lined")


def test_lower_case_means_the_task_of_the_paper(data_root: Path) -> None:
    write_dtd(data_root)
    with pytest.raises(DataError, match="--data vtab/dtd: .*vtab-1k/dtd is missing"):
        open_dataset("dtd", 0)


def test_options_reach_the_class(data_root: Path) -> None:
    write_dtd(data_root, partition=3)
    assert sizes(open_dataset("torchvision:DTD?partition=3", 0)) == [4, 4, 4]
    with pytest.raises(DataError, match=r"no option 'fold' \(it has: partition\)"):
        open_dataset("DTD?fold=3", 0)
    with pytest.raises(DataError, match="no option 'split'"):
        open_dataset("DTD?split=train", 0)


def test_arrays_become_png_without_loss(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_files(monkeypatch, "cifar")
    folder = data_root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pixels = {name: rng.integers(0, 256, (4, 3 * 32 * 32), dtype=np.uint8) for name in names}
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": [0, 1, 1, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car"]}))
    dataset = open_dataset("CIFAR10", seed=0)
    assert dataset.labels == ("plane", "car")
    assert sizes(dataset) == [16, 4, 4]
    shown = np.stack([decode(sample.read()).numpy() for sample in dataset.test])
    assert (shown == pixels["test_batch"].reshape(4, 3, 32, 32)).all()
    assert [sample.target for sample in dataset.test] == [0, 1, 1, 0]
    assert {sample.name for sample in [*dataset.train, *dataset.val]} == {f"CIFAR10/train/{i}" for i in range(20)}


def test_a_data_set_without_splits_is_held_out_from_by_class(data_root: Path) -> None:
    paths = [data_root / "eurosat/2750" / kind / f"{kind}_{i}.jpg" for kind in ("Forest", "River") for i in range(10)]
    write_pictures(paths)
    first, other = open_dataset("torchvision:EuroSAT", seed=0), open_dataset("torchvision:EuroSAT", seed=1)
    assert sizes(first) == [12, 4, 4]
    assert [sum(s.target == 0 for s in split) for split in (first.train, first.val, first.test)] == [6, 2, 2]
    names = [sample.name for split in (first.train, first.val, first.test) for sample in split]
    assert len(set(names)) == 20
    assert {sample.read() for sample in [*first.train, *first.val, *first.test]} == {p.read_bytes() for p in paths}
    # Test images are the same whatever the seed, as eval knows none.
    assert [s.name for s in first.test] == [s.name for s in other.test]
    assert [s.name for s in first.test] == [s.name for s in open_evaluation("torchvision:EuroSAT", first.labels).test]
    assert [s.name for s in first.val] != [s.name for s in other.val]


def test_labels_from_mat_files(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_files(monkeypatch, "flowers102")
    folder = data_root / "flowers-102"
    write_pictures([folder / "jpg" / f"image_{number:05d}.jpg" for number in range(1, 7)])
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 2, 1, 102, 2]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[4, 3]], "tstid": [[5, 6]]})
    dataset = open_dataset("Flowers102", seed=0)
    assert len(dataset.labels) == 102 and dataset.labels[:2] == ("pink primrose", "hard-leaved pocket orchid")
    assert [sample.target for sample in (*dataset.train, *dataset.val, *dataset.test)] == [0, 1, 0, 1, 101, 1]
    assert dataset.test[0].read() == (folder / "jpg/image_00005.jpg").read_bytes()


def test_numbers_without_names_are_the_labels(data_root: Path) -> None:
    """CLEVR counts 3 to 10 objects; its validation images are what there is to report on."""
    folder = data_root / "clevr" / "CLEVR_v1.0"
    (folder / "scenes").mkdir(parents=True)
    for split in ("train", "val"):
        counts = {f"CLEVR_{split}_{index}.png": 3 + 2 * (index % 2) for index in range(4)}
        write_pictures([folder / "images" / split / name for name in counts])
        scenes = [{"image_filename": name, "objects": [{}] * count} for name, count in counts.items()]
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    dataset = open_dataset("CLEVRClassification", 0)
    assert dataset.labels == ("3", "5")
    assert sizes(dataset) == [2, 2, 4]
    assert [sample.target for sample in dataset.test] == [0, 1, 0, 1]


def test_files_that_the_decoder_does_not_take_become_png(data_root: Path) -> None:
    """GTSRB comes as PPM."""
    folder = data_root / "gtsrb"
    train = [folder / "GTSRB" / "Training" / f"{kind:05d}" / f"{i}.ppm" for kind in range(2) for i in range(3)]
    write_pictures(train)
    tests = [folder / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm" for i in range(2)]
    write_pictures(tests)
    (folder / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;1\n1.ppm;0\n")
    dataset = open_dataset("GTSRB", 0)
    assert sizes(dataset) == [4, 2, 2]
    assert [sample.target for sample in dataset.test] == [1, 0]
    expected = np.asarray(Image.open(tests[0])).transpose(2, 0, 1)
    assert (decode(dataset.test[0].read()).numpy() == expected).all()


def test_files_behind_pillow_images_are_handed_over(data_root: Path) -> None:
    folder = data_root / "caltech101" / "101_ObjectCategories"
    write_pictures([folder / kind / f"image_{i:04d}.jpg" for kind in ("ant", "crab") for i in range(1, 6)])
    (folder / "BACKGROUND_Google").mkdir()
    dataset = open_dataset("Caltech101", 0)
    assert dataset.labels == ("ant", "crab")
    assert sizes(dataset) == [6, 2, 2]
    assert {sample.read() for sample in dataset.test} <= {path.read_bytes() for path in folder.rglob("*.jpg")}


def test_synonyms_and_namesakes_become_labels() -> None:
    class ImageNetLike:
        classes = [("crane",), ("great grey owl", "great gray owl"), ("crane",)]

    labels, position = vision._labels("ImageNet", ImageNetLike(), [])
    assert labels == ("crane (0)", "great grey owl, great gray owl", "crane (2)")
    assert position == {0: 0, 1: 1, 2: 2}


def test_every_class_of_the_table_is_torchvisions_and_takes_its_splits(tmp_path: Path) -> None:
    for name, entry in published("torchvision").items():
        arguments = [given for given in entry["splits"].values()]
        kind: Any = getattr(torchvision.datasets, name)
        for given in arguments:
            with pytest.raises((RuntimeError, OSError)):  # not ValueError or TypeError: the arguments are fine
                kind(str(tmp_path), **given)
        assert not arguments or {"train", "test"} <= set(entry["splits"])
        assert entry["get"] and "into" in entry


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("Food101", ["cannot be downloaded (no network", "food-101.tar.gz from https://data.vision.ee.ethz.ch"]),
        ("torchvision:EuroSAT", ["put EuroSAT.zip", "into", "sets/eurosat, archives unpacked"]),
        ("StanfordCars", ["cars_test_annos_withlabels.mat", "stanford_cars"]),
        ("FER2013", ["not in", "fer2013.csv from https://www.kaggle.com"]),
        ("PCAM", ["camelyonpatch_level_2_split"]),
        ("USPS", ["cannot be downloaded (no network", "usps.bz2", "sets, as they are"]),
        ("SEMEION", ["cannot be downloaded (no network", "semeion.data"]),
    ],
)
def test_a_download_that_is_impossible_tells_what_to_put_where(data_root: Path, source: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(source, 0)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(data_root) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_one_line(data_root: Path) -> None:
    folder = write_dtd(data_root)
    (folder / "labels" / "val1.txt").write_text("no slash")
    with pytest.raises(DataError, match="torchvision:DTD: cannot be read in") as caught:
        open_dataset("DTD", 0)
    assert "\n" not in str(caught.value)


def test_opening_decodes_nothing_where_the_class_lists_its_samples(data_root: Path) -> None:
    folder = data_root / "gtsrb" / "GTSRB"
    pictures = [folder / "Training" / f"{label:05d}" / f"{index}.ppm" for label in range(2) for index in range(3)]
    pictures += [folder / "Final_Test" / "Images" / f"{index}.ppm" for index in range(2)]
    write_pictures(pictures)
    (data_root / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;1\n1.ppm;0\n")
    pictures[0].write_bytes(b"no picture")
    dataset = open_dataset("GTSRB", 0)
    assert sizes(dataset) == [4, 2, 2] and [sample.target for sample in dataset.test] == [1, 0]


def test_images_without_a_class_are_refused(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kaggle's competition calls test.csv has no labels."""
    trust_files(monkeypatch, "fer2013")
    folder = data_root / "fer2013"
    folder.mkdir()
    pixels = " ".join(["7"] * 48 * 48)
    (folder / "train.csv").write_text("emotion,pixels\n" + "".join(f"{i % 2},{pixels}\n" for i in range(4)))
    (folder / "test.csv").write_text(f"pixels\n{pixels}\n")
    with pytest.raises(DataError, match="images without a class"):
        open_dataset("FER2013", 0)


@pytest.mark.parametrize("name", ["VOCSegmentation", "Kinetics", "CocoDetection"])
def test_detection_and_segmentation_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"torchvision:{name} has no class for each image.*use one of CIFAR10, "):
        open_dataset(f"torchvision:{name}", 0)


def test_the_docs_name_every_class() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert [name for name in vision.vision_classes() if not re.search(rf"\b{name}\b", text)] == []


def test_the_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT_SERVE_DATA", "~/sets")
    assert vision.data_root() == Path.home() / "sets"
    monkeypatch.delenv("GPT_SERVE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert vision.data_root() == tmp_path / "gpt-serve" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert vision.data_root() == Path.home() / ".cache" / "gpt-serve" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(DataError, match="GPT_SERVE_DATA"):
        vision.data_root()
