"""Published segmentation data, from files in the layouts that their classes expect; nothing is downloaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpt_serve.errors import DataError
from gpt_serve.train.masks.samples import NOTHING, MaskDataset, label_ids
from gpt_serve.train.masks.scan import scan_masks
from gpt_serve.train.masks.sources import find_kind, open_masks
from tests.train.masks.conftest import scene, write_scenes


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_SERVE_DATA", str(tmp_path))
    return tmp_path


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def check(dataset: MaskDataset, sizes: list[int]) -> None:
    splits = (dataset.train, dataset.val, dataset.test)
    assert [len(split) for split in splits] == sizes
    scan_masks(dataset, [sample for split in splits for sample in split], True, lambda: None)


def test_pascal_voc(data_root: Path) -> None:
    root = data_root / "VOCdevkit" / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in (("train", ["a", "b", "c"]), ("val", ["d"])):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            write(root / "JPEGImages" / f"{name}.jpg", scene(0)[0])
            write(root / "SegmentationClass" / f"{name}.png", np.where(scene(0)[1] == 200, 255, 20).astype(np.uint8))
    dataset = open_masks("torchvision:VOCSegmentation", 0)
    check(dataset, [2, 1, 1])
    assert find_kind("VOCSegmentation") == "segmentation"
    assert len(dataset.labels) == 21 and dataset.labels[0] == "background" and dataset.labels[20] == "tvmonitor"
    assert set(np.unique(label_ids(dataset.test[0], dataset.table))) == {20, NOTHING}
    with pytest.raises(DataError, match="no option 'size': use year"):
        open_masks("VOCSegmentation?size=3", 0)


def test_pets_trimaps(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = data_root / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True)
    for split, names in (("trainval", ["Abyssinian_1", "beagle_2"]), ("test", ["beagle_3"])):
        lines = [f"{name} {index + 1} 1 1" for index, name in enumerate(names)]
        (root / "annotations" / f"{split}.txt").write_text("\n".join(lines))
        for name in names:
            write(root / "images" / f"{name}.jpg", scene(1)[0])
            write(root / "annotations" / "trimaps" / f"{name}.png", np.minimum(scene(1)[1], 2) + 1)
    dataset = open_masks("OxfordIIITPet", 0)
    check(dataset, [1, 1, 1])
    assert dataset.labels == ("pet", "background") and dataset.table[1:4].tolist() == [0, 1, NOTHING]


def test_cityscapes(data_root: Path) -> None:
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for index in range(count):
            name = f"ulm_{index:06d}_000019"
            write(data_root / "leftImg8bit" / split / "ulm" / f"{name}_leftImg8bit.png", scene(2)[0])
            labels = data_root / "gtFine" / split / "ulm" / f"{name}_gtFine_labelIds.png"
            write(labels, np.where(scene(2)[1] == 200, 0, 7 + scene(2)[1]).astype(np.uint8))
    dataset = open_masks("Cityscapes", 0)
    check(dataset, [2, 1, 1])
    assert len(dataset.labels) == 19 and dataset.labels[:2] == ("road", "sidewalk")
    assert dataset.table[[0, 7, 8, 9, 255]].tolist() == [NOTHING, 0, 1, NOTHING, NOTHING]


def test_ade20k_by_name(data_root: Path) -> None:
    with pytest.raises(DataError, match=r"ADEChallengeData2016.zip"):
        open_masks("ade20k", 0)
    root = write_scenes(data_root / "ADEChallengeData2016", {"training": 3, "validation": 1}, "annotations")
    (root / "objectInfo150.txt").write_text("Idx\tName\n" + "\n".join(f"{n}\tkind {n}" for n in range(1, 201)))
    dataset = open_masks("ade20k", 0)
    check(dataset, [3, 1, 0])
    assert dataset.labels[0] == "kind 1" and find_kind("ade20k") == "segmentation"


@pytest.mark.parametrize("name", ["VOCSegmentation", "Cityscapes"])
def test_what_is_not_there_is_said_with_what_to_get(
    data_root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError, match=f"{name}: not in .*: put ") as refusal:
        open_masks(name, 0)
    assert "\n" not in str(refusal.value)


def write_hub(folder: Path, columns: dict[str, list[Any]]) -> str:
    datasets = pytest.importorskip("datasets")
    (folder / "data").mkdir(parents=True)
    features = datasets.Features({name: datasets.Image() for name in columns})
    for split, count in (("train", 4), ("validation", 2)):
        table = datasets.Dataset.from_dict({name: rows[:count] for name, rows in columns.items()}, features=features)
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return f"hf:{folder}"


def test_hugging_face_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()
    pixels, values = scene(3)
    write(tmp_path / "image.png", pixels)
    write(tmp_path / "mask.png", values)
    files = {name: {"bytes": (tmp_path / f"{name}.png").read_bytes(), "path": None} for name in ("image", "mask")}
    source = write_hub(tmp_path / "set", {"image": [files["image"]] * 4, "mask": [files["mask"]] * 4})
    assert find_kind(f"{source}?mask=mask") == "segmentation"
    dataset = open_masks(f"{source}?mask=mask&classes=sky,grass,wall", 0, (200,))
    check(dataset, [4, 2, 0])
    assert dataset.labels == ("sky", "grass", "wall")
    assert (label_ids(dataset.train[0], dataset.table)[values < 3] == values[values < 3]).all()
    for options, message in (
        ("mask=other", "append .image=COLUMN"),
        ("masks=x", "no option"),
        ("mask=mask", "classes=a"),
    ):
        with pytest.raises(DataError, match=message):
            open_masks(f"{source}?{options}", 0)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(DataError, match="no such folder or segmentation data"):
        open_masks("streets", 0)
    assert find_kind("streets") == "classification"
