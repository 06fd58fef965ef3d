import hashlib
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.options import data_by_task
from gpt_serve.errors import DataError, UsageError
from gpt_serve.images.decode import decode
from gpt_serve.train.data.counts import count_lines
from gpt_serve.train.data.datasets import digest, open_dataset, open_evaluation
from gpt_serve.train.data.samples import Indexed, Sample, check_names, pick


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


PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


KINDS = {
    "deep/down/1.jfif": "JPEG",
    "2.bmp": "BMP",
    "3.TIF": "TIFF",
    "4.gif": "GIF",
    "5.ppm": "PPM",
    "6.avif": "AVIF",
    "7.jp2": "JPEG2000",
    "no suffix": "PNG",
    "9.image": "WEBP",
}


def test_images_are_used_whatever_their_format_and_name_and_however_deep_they_lie(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/a": 2, "train/b/2024/may": 2})
    for name, kind in KINDS.items():
        (tmp_path / "train/a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train/a" / name).write_bytes(encoded(kind))
    dataset = open_dataset(str(tmp_path), seed=0)
    samples = [*dataset.train, *dataset.val]
    assert sorted(sample.target for sample in samples) == [0] * 11 + [1] * 2
    assert not dataset.unused
    shapes = {tuple(decode(sample.read()).shape) for sample in samples}
    assert shapes == {(3, 10, 12)}


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/a": 2, "elsewhere": 3})
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/again").symlink_to(tmp_path / "train/a")
    dataset = open_dataset(str(tmp_path), seed=0)
    assert sorted(sample.target for sample in [*dataset.train, *dataset.val]) == [0, 0, 1, 1, 1]


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    junk = ("train/.git", "train/__MACOSX", "train/a/@eaDir", ".cache")
    write_images(
        tmp_path, {"train/a": 2, "train/b": 2, "train": 3, "spare": 2, "test": 1, ".": 2} | dict.fromkeys(junk, 1)
    )
    (tmp_path / "train/a/.hidden.png").write_bytes(b"x")
    (tmp_path / "train/a/Thumbs.db").write_bytes(b"x")
    for name in ("a.txt", "b.txt", "BMW", "heic.HEIC"):
        (tmp_path / "train/a" / name).write_text("BMW and P2P: no pictures")
    dataset = open_dataset(str(tmp_path), seed=0)
    assert dataset.labels == ("a", "b")
    assert len(dataset.train) + len(dataset.val) == 4
    assert dataset.unused == (
        "not used: spare/, 2 images in no folder; the splits are test/, train/",
        "not used in train/: files that are no images (.txt 2, without a suffix 1, .heic 1)",
        "not used in train/: 3 images in no class folder",
        "not used in train/: what lies in .git, @eaDir, __MACOSX",
        "not used in test/: 1 image in no class folder",
        "not used: test/, which has no images in class folders",
    )


def test_a_class_without_images_is_told_what_it_has_instead(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/a": 2, "train/b": 0})
    (tmp_path / "train/b/photo.heic").write_bytes(b"no image that is read")
    with pytest.raises(DataError, match=r"for class b; not used in train/: files that are no images \(\.heic 1\)$"):
        open_dataset(str(tmp_path), seed=0)


@pytest.mark.parametrize("name", ["validation", "val", "Valid", "dev"])
def test_splits_go_by_several_names(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, {f"{split}/{label}": 2 for split in ("Training", name, "testing") for label in "ab"})
    dataset = open_dataset(str(tmp_path), seed=0)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [4, 4, 4]
    assert {Path(sample.name).parts[-3] for sample in dataset.val} == {name}
    assert len(open_evaluation(str(tmp_path), dataset.labels).test) == 4


def test_classes_may_be_missing_in_val_and_test_as_they_may_in_eval(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "test/b": 1})
    dataset = open_dataset(str(tmp_path), seed=0)
    assert [[sample.target for sample in split] for split in (dataset.val, dataset.test)] == [[0, 0], [1]]
    assert [sample.target for sample in open_evaluation(str(tmp_path), dataset.labels).test] == [1]


def test_spellings_of_a_class_are_one_class(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    names = (f"train/{composed}", f"train/{apart}", "train/tea", f"test/{apart}", "test/tea")
    write_images(tmp_path, dict.fromkeys(names, 2))
    dataset = open_dataset(str(tmp_path), seed=0)
    assert dataset.labels == (composed, "tea")
    assert [sample.target for sample in dataset.test] == [0, 0, 1, 1]
    assert sorted(sample.target for sample in [*dataset.train, *dataset.val]) == [0, 0, 0, 0, 1, 1]
    for labels in ((composed, "tea"), (apart, "tea")):  # older adapters may have the other spelling
        assert [sample.target for sample in open_evaluation(str(tmp_path), labels).test] == [0, 0, 1, 1]
    assert check_names([apart, "tea"], "x") == (composed, "tea")
    with pytest.raises(DataError, match="two classes of the name 'caf\u00e9'"):
        check_names([apart, composed], "x")


def test_names_of_many_languages_are_labels(tmp_path: Path) -> None:
    names = (
        "\u0645\u06cc\u200c\u0631\u0648\u0645",
        "Paris\u00a0(France)",
        "\u82b1",
        "\U0001f469\u200d\U0001f33e",
    )
    write_images(tmp_path, {f"train/{name}": 2 for name in names})
    assert set(open_dataset(str(tmp_path), seed=0).labels) == set(names)


@pytest.mark.parametrize("name", ["a\tb", "a\u2028b", "\x7f", os.fsdecode(b"caf\xe9"), "x" * 257, ""])
def test_names_that_cannot_be_shown_are_no_labels(name: str) -> None:
    with pytest.raises(DataError, match="whose name cannot be a label: rename"):
        check_names([name, "b"], "x")


def test_counts_are_a_row_per_class_or_a_line_per_split() -> None:
    few = {"train": [0, 0, 1, 2], "val": [0], "test": []}
    assert count_lines(("ant", "bee", "tyrannosaur"), {name: samples(of) for name, of in few.items()}) == [
        "class        train  val",
        "ant              2    1",
        "bee              1    0",
        "tyrannosaur      1    0",
        "all 3            4    1",
    ]
    labels = [f"class {number}" for number in range(30)]
    many = {"train": [*range(30)] * 2, "test": [*range(1, 30), 7, 7]}
    assert count_lines(labels, {name: samples(of) for name, of in many.items()}) == [
        "train: 60 images, 2 of each of 30 classes",
        "test: 31 images, 1 (class 1) to 3 (class 7) of each of 29 classes, none of class 0",
    ]


def samples(targets: list[int]) -> list[Sample]:
    return [Sample(str(index), bytes, target) for index, target in enumerate(targets)]


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
        ({"train/cat": 3, "train/dog": 3, "val/cat": 1, "Validation/dog": 1}, "both Validation/ and val/: leave one"),
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
    assert [sample.target for sample in open_evaluation(str(tmp_path), ("a", "b")).test] == [0, 0, 1]
    assert [sample.target for sample in open_evaluation(str(tmp_path / "loose"), ("a", "b")).test] == [0]
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
    assert [sample.name for sample in open_evaluation("digits", dataset.labels).test] == [s.name for s in dataset.test]
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
