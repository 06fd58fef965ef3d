import hashlib
import pickle
import re
from pathlib import Path

import pytest
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.options import data_by_task
from gpt_serve.errors import DataError, UsageError
from gpt_serve.images.decode import decode
from gpt_serve.train.data.datasets import digest, open_dataset, open_evaluation
from gpt_serve.train.data.samples import Indexed, pick


def write_images(root: Path, counts: dict[str, int]) -> None:
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (12, 10), (index * 9 % 255, 40, 80)).save(root / folder / f"{index}.png")


def test_a_fifth_of_each_class_is_held_out_by_seed(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/cat": 10, "train/dog": 5})
    first, again, other = (open_dataset(str(tmp_path), seed) for seed in (0, 0, 1))
    assert first.labels == ("cat", "dog")
    assert [sample.target for sample in first.val] == [0, 0, 1]
    names = {sample.name for sample in [*first.train, *first.val]}
    assert len(names) == 15
    assert [sample.name for sample in first.val] == [sample.name for sample in again.val]
    assert [sample.name for sample in first.val] != [sample.name for sample in other.val]
    assert not first.test


def test_given_splits_are_kept(tmp_path: Path) -> None:
    write_images(tmp_path, {f"{split}/{label}": 2 for split in ("train", "val", "test") for label in "ab"})
    dataset = open_dataset(str(tmp_path), seed=0)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [4, 4, 4]
    assert all("/val/" in sample.name for sample in dataset.val)


def test_hidden_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/a": 2, "train/b": 2, "train/.cache": 1})
    (tmp_path / "train/a/.hidden.png").write_bytes(b"x")
    (tmp_path / "train/a/notes.txt").write_text("x")
    dataset = open_dataset(str(tmp_path), seed=0)
    assert dataset.labels == ("a", "b")
    assert len(dataset.train) + len(dataset.val) == 4


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no such folder"),
        ({"cat": 3, "dog": 3}, "expected a folder train/"),
        ({"train": 0}, "holds no class folders"),
        ({"train/cat": 3}, r"single class \(cat\)"),
        ({"train/cat": 3, "train/do\ng": 3}, "cannot be a label: rename 'do"),
        ({"train/cat": 3, "train/dog": 0}, "no images .* for class dog"),
        ({"train/cat": 3, "train/dog": 1}, "too few images .* to hold one out of class dog"),
        ({"train/cat": 3, "train/dog": 3, "val/cow": 1}, "training did not see: cow"),
        ({"train/cat": 3, "train/dog": 3, "val/cat": 1}, "no images .* for class dog"),
        ({"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/ant": 1, "test/dog": 1}, "did not see: ant"),
    ],
)
def test_a_folder_that_cannot_work_is_refused_in_one_line(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    root = tmp_path / "data"
    write_images(root, counts)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(str(root), seed=0)
    assert "\n" not in str(caught.value)


def test_evaluation_uses_the_test_folder_or_the_folder_itself(tmp_path: Path) -> None:
    write_images(tmp_path, {"test/a": 2, "test/b": 1, "loose/a": 1})
    assert [sample.target for sample in open_evaluation(str(tmp_path), ("a", "b"))] == [0, 0, 1]
    assert [sample.target for sample in open_evaluation(str(tmp_path / "loose"), ("a", "b"))] == [0]
    with pytest.raises(DataError, match="training did not see: b"):
        open_evaluation(str(tmp_path), ("a",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no class folders with images"):
        open_evaluation(str(tmp_path / "empty"), ("a",))
    with pytest.raises(DataError, match=re.escape("no such folder")):
        open_evaluation(str(tmp_path / "missing"), ("a",))


def test_digits_are_real_images_with_disjoint_splits() -> None:
    dataset = open_dataset("digits", seed=0)
    splits = [dataset.train, dataset.val, dataset.test]
    assert sum(map(len, splits)) == len({sample.name for split in splits for sample in split}) == 1797
    assert [sample.name for sample in open_evaluation("digits", dataset.labels)] == [s.name for s in dataset.test]
    image = decode(dataset.test[0].read())
    assert image.shape == (3, 8, 8)
    assert image.max() > 200


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("flwers", "did you mean fgvc/flowers?"),
        ("vtab/eurosatt", "did you mean vtab/eurosat?"),
        ("fgvc/eurosat", "did you mean vtab/eurosat?"),
        ("torchvision:Food", "did you mean torchvision:Food101?"),
        ("digit", "did you mean digits?"),
        ("no-such-thing-at-all", "no such folder or data set: give an image folder, digits, fgvc/TASK"),
        ("./no/such", "no such folder or data set"),
        ("ade20k", "no such folder or data set"),
        ("fgvc/cub?x=1", "takes no options"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(source: str, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        open_dataset(source, seed=0)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--data {source}")


def test_a_name_that_the_disk_refuses_is_one_line() -> None:
    with pytest.raises(DataError, match="^--data (x/)+.* cannot be read: File name too long$"):
        open_dataset("x/" * 3000, seed=0)


def test_a_file_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        open_dataset(str(tmp_path / "file"), seed=0)


def test_shipped_adapters_still_know_their_digits() -> None:
    """The bytes and the split of the built-in digits are part of what adapters record."""
    recorded = AdapterStore(Path(__file__).parents[2] / "adapters").load("digits").adapter.training
    dataset = open_dataset("digits", recorded["recipe"]["seed"])
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    hashes = [
        (f"{name}/{dataset.labels[sample.target]}", index, hashlib.sha256(sample.read()).hexdigest())
        for name, split in splits.items()
        for index, sample in enumerate(split)
    ]
    assert digest(hashes) == recorded["data"]["sha256"]


def test_samples_made_on_demand_behave_as_a_list() -> None:
    samples = Indexed("set", bytes, targets=[0, 1, 2, 1], indices=range(4))
    assert [sample.name for sample in samples] == ["set/0", "set/1", "set/2", "set/3"]
    assert [sample.target for sample in samples[1:3]] == [1, 2]
    assert samples[-1].read() == bytes(3)
    some = pickle.loads(pickle.dumps(pick(samples, [3, 1])))
    assert [(sample.name, sample.target) for sample in some] == [("set/3", 1), ("set/1", 1)]
    with pytest.raises(IndexError):
        samples[4]


def test_the_digest_follows_content_not_order() -> None:
    first = [("train/a", 0, "aa"), ("train/b", 0, "bb")]
    assert digest(first) == digest(first[::-1])
    assert digest(first) != digest([("train/a", 0, "aa"), ("train/b", 0, "cc")])


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "split=3/x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("split=3/x", f"{tmp_path}/split=3/x", "./split=4"):
        assert data_by_task([path], ["birds"]) == {"birds": path}
    assert data_by_task(["birds=split=3/x"], ["birds", "split"]) == {"birds": "split=3/x"}
    assert data_by_task(["split=3/x"], ["birds", "split"]) == {"split": "3/x"}


def test_data_may_be_given_by_task_and_with_options() -> None:
    tasks = ("birds", "cars")
    assert data_by_task(["birds=DIR", "cars=hf:o/n?label=x"], tasks) == {"birds": "DIR", "cars": "hf:o/n?label=x"}
    assert data_by_task(["hf:o/n?label=x"], tasks[:1]) == {"birds": "hf:o/n?label=x"}
    assert data_by_task(["brds=DIR"], tasks[:1]) == {"brds": "DIR"}  # a typing error, which export then names
    with pytest.raises(UsageError, match="does not say for which task"):
        data_by_task(["hf:o/n?label=x"], tasks)
