"""Tables of images with several labels each."""

from pathlib import Path

import pytest
from PIL import Image

from gpt_serve.errors import DataError
from gpt_serve.train.data.datasets import open_dataset, open_evaluation
from gpt_serve.train.data.samples import multi_hot


def folder(root: Path, table: str, images: tuple[str, ...] = ("1.png", "2.png", "3.png")) -> Path:
    """A folder with a table and images."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels.csv").write_text(table, encoding="utf-8")
    for name in images:
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def test_a_table_gives_each_image_its_labels(tmp_path: Path) -> None:
    table = "\ufefffile,label\n1.png,sea,dog\n2.png, cat \nsub/3.png,dog\n\n"
    folder(tmp_path / "train", table, ("1.png", "2.png", "sub/3.png"))
    folder(tmp_path / "val", "1.png,cat\n")
    folder(tmp_path / "test", '1.png,"sea"\n')
    data = open_dataset(str(tmp_path), 0)
    assert data.multi_label and data.labels == ("cat", "dog", "sea")
    assert [sample.targets for sample in data.train] == [(1, 2), (0,), (1,)]
    assert multi_hot(data.train, 3).tolist() == [[0, 1, 1], [1, 0, 0], [0, 1, 0]]
    assert [sample.targets for sample in (*data.val, *data.test)] == [(0,), (2,)]
    assert data.train[0].read() and [sample.targets for sample in open_evaluation(str(tmp_path), data.labels).test] == [
        (2,)
    ]


def test_a_table_without_splits_has_a_fifth_held_out(tmp_path: Path) -> None:
    names = tuple(f"{index}.png" for index in range(10))
    root = folder(tmp_path / "all", "".join(f"{name},l{index % 3},x\n" for index, name in enumerate(names)), names)
    data = open_dataset(str(root), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 0)
    assert {sample.name for sample in data.val} == {sample.name for sample in open_dataset(str(root), 0).val}
    assert len(open_evaluation(str(root), data.labels).test) == 10


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("1.png,a\n9.png,b\n", r"labels.csv, line 2: there is no image '9.png' in .*: correct its path"),
        ("1.png,a\n2.png,a,\n", "line 2: '2.png' has an empty label: remove the comma too many"),
        ("1.png,a\n2.png\n", "line 2: '2.png' has no label: give it at least one"),
        ("1.png,a\n1.png,b\n", "line 2: '1.png' is named for the second time"),
        ("1.png,a,b,a\n", "line 1: '1.png' has a label twice: remove one"),
        ("../1.png,a\n", "'../1.png' lies outside of"),
        ("file,label\n", "labels.csv names no image: give each a line"),
        ("1.png,a\n2.png,a\n", "has a single class"),
    ],
)
def test_a_mistake_in_a_table_is_one_line(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(str(folder(tmp_path / "data", table)), 0)
    assert "\n" not in str(caught.value)


def test_labels_that_training_did_not_see_and_missing_tables_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "train", "1.png,a\n2.png,b\n")
    folder(tmp_path / "test", "1.png,c\n")
    with pytest.raises(DataError, match="classes that training did not see: c"):
        open_dataset(str(tmp_path), 0)
    (tmp_path / "train" / "labels.csv").unlink()
    with pytest.raises(DataError, match=r"expected .*train/labels.csv beside the other tables"):
        open_dataset(str(tmp_path), 0)


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00,a\n")
    with pytest.raises(DataError, match="cannot be read: it is not a table in UTF-8"):
        open_dataset(str(tmp_path), 0)
