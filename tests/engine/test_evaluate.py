"""Accuracy of a stored adapter, against counting by hand."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine import engine as engine_module
from gpt_serve.engine import evaluate as evaluation
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.evaluate import evaluate_task
from gpt_serve.errors import BackboneMismatch, DataError, UnknownTask, UsageError
from gpt_serve.images.convert import readable
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.datasets import Dataset, Sample
from tests.factories import make_adapter, remove_adapter

LABELS = ("ant", "bee", "cow")


def write_images(folder: Path, per_class: int = 5, labels: tuple[str, ...] = LABELS) -> Path:
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True)
        for index in range(per_class):
            generator = torch.Generator().manual_seed(10 * number + index)
            noise = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture
def engine(tiny: Backbone, tmp_path: Path) -> Engine:
    store = AdapterStore(tmp_path / "adapters")
    store.publish(make_adapter(tiny.spec, "alpha", labels=LABELS, seed=3))
    return Engine(tiny, store)


def by_hand(engine: Engine, folder: Path) -> float:
    hits = []
    for path in folder.glob("*/*.png"):
        (result,) = engine.predict([("alpha", path.read_bytes())])
        hits.append(LABELS[int(result.probabilities.argmax())] == path.parent.name)
    return sum(hits) / len(hits)


@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_accuracy_is_the_share_of_hits(engine, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    folder = write_images(tmp_path / "data")
    result = evaluate_task(engine, "alpha", str(folder))
    expected = by_hand(engine, folder)
    assert 0 < expected < 1  # else the comparison would say little
    assert result == {
        "task": "alpha",
        "revision": engine.bank.store.load("alpha").revision,
        "accuracy": pytest.approx(expected),
        "n": 15,
    }


def test_the_test_folder_is_preferred(engine, tmp_path):
    write_images(tmp_path / "data" / "train", per_class=2)
    write_images(tmp_path / "data" / "test", per_class=4)
    assert evaluate_task(engine, "alpha", str(tmp_path / "data"))["n"] == 12


def test_classes_may_be_missing(engine, tmp_path):
    folder = write_images(tmp_path / "data", labels=("cow",))
    result = evaluate_task(engine, "alpha", str(folder))
    assert (result["n"], result["accuracy"]) == (5, pytest.approx(by_hand(engine, folder)))


def test_unreadable_image_is_named(engine, tmp_path):
    folder = write_images(tmp_path / "data")
    bad = folder / "bee" / "2.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"^cannot read {bad}: PNG image is damaged.*; replace or remove it$"):
        evaluate_task(engine, "alpha", str(folder))


def test_image_that_is_not_there_is_named(engine, tmp_path):
    folder = write_images(tmp_path / "data")
    (folder / "bee" / "x.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"^cannot read .*x\.jpg: No such file or directory; replace or remove it$"):
        evaluate_task(engine, "alpha", str(folder))


def test_what_is_not_used_is_said(engine, tmp_path):
    folder = write_images(tmp_path / "data")
    (folder / "bee" / "notes.txt").write_text("x")
    said: list[str] = []
    assert evaluate_task(engine, "alpha", str(folder), said.append)["n"] == 15
    assert said == ["not used in data/: files that are no images (.txt 1)"]


def test_class_that_training_did_not_see(engine, tmp_path):
    folder = write_images(tmp_path / "data", labels=("ant", "yak"))
    with pytest.raises(DataError, match="holds classes that training did not see: yak"):
        evaluate_task(engine, "alpha", str(folder))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_folder_without_images(engine, tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=f"--data {tmp_path / 'data'}"):
        evaluate_task(engine, "alpha", str(tmp_path / "data"))


def test_adapter_is_checked_before_the_data(engine):
    with pytest.raises(UnknownTask):
        evaluate_task(engine, "nobody", "no such folder")
    engine.bank.store.publish(make_adapter(engine.backbone.spec, "foreign", backbone_sha256="cd" * 32))
    with pytest.raises(BackboneMismatch):
        evaluate_task(engine, "foreign", "no such folder")


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_accuracy_is_of_one_revision(engine, tmp_path, monkeypatch, change):
    monkeypatch.setattr(evaluation, "CHUNK", 4)
    folder = write_images(tmp_path / "data")
    store = engine.bank.store
    decode, seen = engine_module.decode, []

    def change_after_five(*args, **options):
        seen.append(1)
        if len(seen) == 5 and change == "replace":
            store.publish(make_adapter(engine.backbone.spec, "alpha", labels=LABELS, seed=4))
        elif len(seen) == 5:
            remove_adapter(store, "alpha")
        return decode(*args, **options)

    monkeypatch.setattr(engine_module, "decode", change_after_five)
    error, words = (UsageError, "was replaced while") if change == "replace" else (UnknownTask, "unknown task 'alpha'")
    with pytest.raises(error, match=words):
        evaluate_task(engine, "alpha", str(folder))


def test_an_image_of_no_known_format_is_named(engine, monkeypatch):
    """What a library stores may be anything."""
    sample = Sample("set/test/0", lambda: readable(b"no image"), 0)
    monkeypatch.setattr(evaluation, "open_evaluation", lambda source, labels: Dataset(LABELS, test=[sample]))
    with pytest.raises(DataError, match=r"^cannot read set/test/0: file is not a JPEG, PNG or WebP"):
        evaluate_task(engine, "alpha", "hf:owner/name")
