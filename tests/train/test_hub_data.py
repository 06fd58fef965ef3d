"""Data sets that the library ``datasets`` reads: here from folders that the test writes, without a hub."""

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpt_serve.errors import DataError
from gpt_serve.images import convert
from gpt_serve.images.decode import ImageLimits, decode
from gpt_serve.train.data.datasets import Dataset, open_dataset, open_evaluation
from gpt_serve.train.data.views import scan
from tests.tiny_vit import PREPROCESS

datasets = pytest.importorskip("datasets")

CLASSES = ["ant", "bee"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()


def picture(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, splits: dict[str, list[Any]], label: Any = None, **more: Any) -> Path:
    """A parquet file for each split, with the columns ``image`` and ``label``; ``more`` repeats the labels."""
    (folder / "data").mkdir(parents=True)
    feature = label or datasets.ClassLabel(names=CLASSES)
    for number, (split, labels) in enumerate(splits.items()):
        images = [{"bytes": picture(100 * number + index), "path": None} for index in range(len(labels))]
        columns = {"image": images, "label": labels, **{name: labels for name in more}}
        features = datasets.Features({"image": datasets.Image(), "label": feature, **more})
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def sizes(dataset: Dataset) -> list[int]:
    return [len(split) for split in (dataset.train, dataset.val, dataset.test)]


def test_splits_columns_and_classes_are_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"train": [0, 1, 1], "validation": [1], "test": [1, 0]})
    dataset = open_dataset(f"hf:{folder}", seed=0)
    assert dataset.labels == ("ant", "bee")
    assert sizes(dataset) == [3, 1, 2]
    assert [sample.target for sample in (*dataset.train, *dataset.val, *dataset.test)] == [0, 1, 1, 1, 1, 0]
    # The stored files themselves, not their pixels encoded anew.
    assert [sample.read() for sample in dataset.train] == [picture(index) for index in range(3)]
    found = open_evaluation(f"hf:{folder}", ("bee", "ant")).test
    assert [(sample.read(), sample.target) for sample in found] == [(picture(200), 0), (picture(201), 1)]
    with pytest.raises(DataError, match="training did not see: bee"):
        open_evaluation(f"hf:{folder}", ("ant", "cow"))


def test_missing_validation_is_held_out_and_missing_test_too_when_there_is_one_split(tmp_path: Path) -> None:
    two = write(tmp_path / "two", {"train": [0, 1] * 5, "test": [1, 0]})
    assert sizes(open_dataset(f"hf:{two}", seed=0)) == [8, 2, 2]
    one = write(tmp_path / "one", {"train": [0, 1] * 10})
    dataset = open_dataset(f"hf:{one}", seed=0)
    assert sizes(dataset) == [12, 4, 4]
    assert [sample.name for sample in open_evaluation(f"hf:{one}", CLASSES).test] == [s.name for s in dataset.test]


def test_splits_may_be_chosen(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"train": [0, 1] * 5, "validation": [1, 0]})
    with pytest.raises(DataError, match="has no test split"):
        open_evaluation(f"hf:{folder}", CLASSES)
    assert sizes(open_dataset(f"hf:{folder}?test=validation", 0)) == [8, 2, 2]
    assert len(open_evaluation(f"hf:{folder}?test=validation", CLASSES).test) == 2
    with pytest.raises(DataError, match=r"no split 'dev': it has train, validation"):
        open_dataset(f"hf:{folder}?test=dev", 0)
    odd = write(tmp_path / "odd", {"train": [0, 1] * 2, "test": [0, 1] * 5})
    assert sizes(open_dataset(f"hf:{odd}?train=test&test=train", 0)) == [8, 2, 4]


@pytest.mark.parametrize(
    ("label", "values", "labels"),
    [("string", ["wasp", "ant", "wasp", "ant"], ("ant", "wasp")), ("int64", [10, 9, 10, 9], ("9", "10"))],
)
def test_a_column_of_strings_or_numbers_may_be_named_as_label(
    tmp_path: Path, label: str, values: list[Any], labels: tuple[str, ...]
) -> None:
    folder = write(tmp_path / "set", {"train": values, "test": values[:2]}, datasets.Value(label))
    with pytest.raises(DataError, match=r"no label column; columns: image, label: append \?label=COLUMN"):
        open_dataset(f"hf:{folder}", 0)
    dataset = open_dataset(f"hf:{folder}?label=label", 0)
    assert dataset.labels == labels
    assert [dataset.labels[sample.target] for sample in dataset.test] == [str(value) for value in values[:2]]


def test_two_spellings_of_a_name_are_one_class_and_other_splits_are_named(tmp_path: Path) -> None:
    values = ["caf\u00e9", "cafe\u0301", "tea", "tea"]
    splits = {"train": values, "test": values[:1], "extra": values[:3]}
    dataset = open_dataset(f"hf:{write(tmp_path / 'set', splits, datasets.Value('string'))}?label=label", 0)
    assert dataset.labels == ("caf\u00e9", "tea")
    assert sorted(sample.target for sample in [*dataset.train, *dataset.val]) == [0, 0, 1, 1]
    assert dataset.unused == ("not used: the splits extra (3 images)",)


def test_several_label_columns_are_a_question(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"train": [0, 1] * 2, "test": [0]}, coarse=datasets.ClassLabel(names=["x", "y"]))
    with pytest.raises(DataError, match=r"several label columns \(label, coarse\).*\?label=COLUMN"):
        open_dataset(f"hf:{folder}", 0)
    assert open_dataset(f"hf:{folder}?label=coarse", 0).labels == ("x", "y")
    with pytest.raises(DataError, match="no image column 'label': it has image"):
        open_dataset(f"hf:{folder}?image=label&label=coarse", 0)
    with pytest.raises(DataError, match="no option 'lable': use config, image, label"):
        open_dataset(f"hf:{folder}?lable=coarse", 0)


def test_images_without_a_class_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"train": [0, 1] * 2, "test": [-1, -1]})
    with pytest.raises(DataError, match=r"2 images have no class \(-1\): choose another split for it, such as \?test="):
        open_dataset(f"hf:{folder}", 0)


@pytest.mark.parametrize("kind", ["float64", "list"])
def test_a_column_that_holds_no_classes_is_refused(tmp_path: Path, kind: str) -> None:
    feature = datasets.Sequence(datasets.Value("int64")) if kind == "list" else datasets.Value(kind)
    folder = write(tmp_path / "set", {"train": [[1], [2]] if kind == "list" else [0.5, 0.25]}, feature)
    with pytest.raises(DataError, match="the column 'label' holds no classes"):
        open_dataset(f"hf:{folder}?label=label", 0)


def test_rows_without_an_image_and_images_of_too_many_pixels_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    images = [None, {"bytes": picture(0, "BMP"), "path": None}, *({"bytes": picture(i), "path": None} for i in (1, 2))]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
    table.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    table.to_parquet(str(folder / "test-00000-of-00001.parquet"))
    monkeypatch.setattr(convert, "LOCAL_LIMITS", ImageLimits(max_pixels=30))
    found = scan(open_dataset(f"hf:{folder.parent}", 0).test, PREPROCESS, lambda: None)
    assert [image.reason.split(" (")[0] for image in found.unreadable[:1]] == ["the row holds no image"]
    assert "more than the 30 allowed" in found.unreadable[1].reason and len(found.unreadable) == 2


def test_images_that_the_decoder_does_not_take_become_png(tmp_path: Path) -> None:
    for label in CLASSES:
        for index in range(3):
            path = tmp_path / "set" / "train" / label / f"{index}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(index, "BMP"))
    sample = open_dataset(f"hf:{tmp_path / 'set'}", 0).train[0]
    with Image.open(io.BytesIO(picture(0, "BMP"))) as expected:
        assert decode(sample.read()).shape == (3, *np.asarray(expected).shape[:2])
    assert sample.read().startswith(b"\x89PNG")


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach {path!r}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for source in ("hf:owner/name", "owner/name"):
        with pytest.raises(DataError, match=r"no such folder, and .*Couldn't reach 'owner/name' on the Hub") as caught:
            open_dataset(source, 0)
        assert "huggingface.co/datasets/owner/name" in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match=r"no such folder; .*pip install 'gpt-serve\[hf\]'"):
        open_dataset("owner/name", 0)
