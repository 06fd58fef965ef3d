"""Folders and tables of images: each image exactly once, whatever is broken and whenever the run ends."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gpt_serve.bulk import parts as parts_module
from gpt_serve.bulk.inputs import Images, open_images
from gpt_serve.bulk.parts import SCHEMA, Parts
from gpt_serve.bulk.predict import predict_in_bulk
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import DataError, ImageError, UnknownTask, UsageError
from gpt_serve.model.backbone import Backbone
from tests.factories import make_adapter, make_engine, remove_adapter
from tests.s3 import S3

TASKS = ("alpha", "beta")


def encode(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def engine(tiny: Backbone, tmp_path: Path) -> Engine:
    return make_engine(tiny, tmp_path / "adapters", TASKS, max_batch=4)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "PART", 5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """13 files in two folders: one is damaged, one no image at all, one a bitmap, and what is to be left alone."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for number in range(10):
        (root / ("more" if number % 2 else ".") / f"{number}.png").write_bytes(encode(number))
    (root / "cut.jpg").write_bytes(encode(20, "JPEG")[:200])
    (root / "text.png").write_text("not an image")
    (root / "more" / "bitmap.bmp").write_bytes(encode(21, "BMP"))
    (root / "notes.txt").write_text("no image, and no name of one")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(encode(0))
    return root


def results(engine: Engine, images: Images, output: Path, tasks: Any = TASKS) -> list[dict[str, Any]]:
    predict_in_bulk(engine, tasks, images, Parts(output, images, tasks), lambda count: None)
    return pq.read_table(output).to_pylist()


def check(rows: list[dict[str, Any]], engine: Engine, data: dict[str, bytes], tasks: Any = TASKS) -> None:
    """Against the engine, asked for one image at a time."""
    for row in rows:
        (expected,) = engine.predict([(row["task"], data[row["image"]])])
        if isinstance(expected, ImageError):
            assert row["error"] == str(expected) and row["label"] is row["probability"] is row["revision"] is None
        else:
            ((label, probability),) = expected.top(1)
            assert (row["label"], row["revision"], row["error"]) == (label, expected.revision, None)
            assert row["probability"] == pytest.approx(probability, abs=1e-5)


def test_a_folder(engine: Engine, folder: Path, tmp_path: Path) -> None:
    rows = results(engine, open_images(str(folder)), tmp_path / "out.parquet")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
    names = sorted([name for name in names if ".hidden" not in name] + ["more/bitmap.bmp"])
    assert [(row["image"], row["task"]) for row in rows] == [(name, task) for name in names for task in TASKS]
    check(
        [row for row in rows if "bmp" not in row["image"] and "text" not in row["image"]],
        engine,
        {name: (folder / name).read_bytes() for name in names},
    )
    failed = {row["image"]: row["error"] for row in rows if row["error"]}
    assert set(failed) == {"cut.jpg", "text.png"} and "not a JPEG, PNG or WebP" in failed["text.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "images", "out.parquet"]
    assert pq.read_schema(tmp_path / "out.parquet").equals(SCHEMA)


def table(path: Path, column: Any, name: str = "image", group: int = 4) -> Path:
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["bytes", "paths", "structs"])
def test_tables(kind: str, engine: Engine, tmp_path: Path) -> None:
    files = [encode(seed) for seed in range(11)]
    files[3] = b"broken"
    for number, data in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(data)
    columns = {
        "bytes": [*files, None],
        "paths": [*[f"{number}.png" for number in range(11)], None],
        "structs": [*[{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(files)], None],
    }
    table(tmp_path / "a.parquet", pa.array(columns[kind][:7]))
    table(tmp_path / "b.parquet", pa.array(columns[kind][7:]))
    images = open_images(f"{tmp_path}/?.parquet")
    assert len(images) == 12
    rows = results(engine, images, tmp_path / "out.parquet", ["alpha"])
    names = [f"a.parquet#{n}" for n in range(7)] + [f"b.parquet#{n}" for n in range(5)]
    shown = names if kind == "bytes" else [*[f"{number}.png" for number in range(11)], names[-1]]
    assert [row["image"] for row in rows] == shown
    check(
        [row for index, row in enumerate(rows) if index not in (3, 11)], engine, dict(zip(shown, files, strict=False))
    )
    assert [index for index, row in enumerate(rows) if row["error"]] == [3, 11]
    assert rows[11]["error"] == "there is none in this row"


def test_a_table_is_read_from_any_row(tmp_path: Path) -> None:
    files = [encode(seed) for seed in range(13)]
    table(tmp_path / "a.parquet", pa.array(files[:8]), group=3)
    table(tmp_path / "b.parquet", pa.array(files[8:]), group=2)
    images = open_images(f"{tmp_path}/*.parquet")
    for start in range(13):
        for stop in range(start, 14):
            read = [entry.data for entries in images.read(start, min(stop, 13), 2) for entry in entries]
            assert read == files[start:stop], (start, stop)


def test_images_in_a_bucket(engine: Engine, s3: S3, tmp_path: Path) -> None:
    for number in range(6):
        s3.client.put_object(Bucket="models", Key=f"images/{number}.png", Body=encode(number))
    rows = results(engine, open_images("s3://models/images"), tmp_path / "out.parquet", ["alpha"])
    assert [row["image"] for row in rows] == [f"{number}.png" for number in range(6)]
    check(rows, engine, {f"{number}.png": encode(number) for number in range(6)})
    with pytest.raises(UsageError, match="--input s3://nothing-here/x cannot be read"):
        open_images("s3://nothing-here/x")


def test_a_run_that_was_killed_is_continued_and_no_image_is_computed_twice(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(str(folder))
    whole = results(engine, images, tmp_path / "whole.parquet")
    asked: list[int] = []
    predict = engine.predict

    def killed(requests: Any) -> Any:
        if sum(asked) >= 8:
            raise KeyboardInterrupt
        asked.append(len(requests) // 2)
        return predict(requests)

    monkeypatch.setattr(engine, "predict", killed)
    output, told = tmp_path / "out.parquet", []
    with pytest.raises(KeyboardInterrupt):
        results(engine, images, output)
    assert not output.exists()
    monkeypatch.setattr(engine, "predict", predict)
    predict_in_bulk(engine, TASKS, images, Parts(output, open_images(str(folder)), TASKS), told.append)
    assert told[0] == 5 and sum(told) == 13, "the first part is there already"
    for one, other in zip(pq.read_table(output).to_pylist(), whole, strict=True):
        assert one | {"probability": None} == other | {"probability": None}


def test_parts_of_another_run_are_not_mixed_in(engine: Engine, folder: Path, tmp_path: Path, monkeypatch) -> None:
    images, output = open_images(str(folder)), tmp_path / "out.parquet"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Parts, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        results(engine, images, output)
    (folder / "new.png").write_bytes(encode(30))
    for other, tasks in ((open_images(str(folder)), TASKS), (images, ["alpha"])):
        with pytest.raises(UsageError, match="holds parts of another run, of other images or tasks"):
            results(engine, other, output, tasks)
    results(engine, images, output)


def test_two_at_once(engine: Engine, folder: Path, tmp_path: Path) -> None:
    images = open_images(str(folder))
    parts = Parts(tmp_path / "out.parquet", images, TASKS)
    with parts.held(), pytest.raises(UsageError, match="is being written by another process"):
        results(engine, images, tmp_path / "out.parquet")


def test_an_adapter_that_goes_ends_the_run_and_what_is_done_stays(engine: Engine, folder: Path, tmp_path: Path) -> None:
    images, output = open_images(str(folder)), tmp_path / "out.parquet"
    store = engine.bank.store
    done: list[int] = []

    def remove(count: int) -> None:
        done.append(count)
        if sum(done) >= 7 and "beta" in store.tasks():
            remove_adapter(store, "beta")

    with pytest.raises(UnknownTask):
        predict_in_bulk(engine, TASKS, images, Parts(output, images, TASKS), remove)
    store.publish(make_adapter(engine.backbone.spec, "beta", seed=1))
    assert len(results(engine, images, output)) == 26


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        (pa.array([], pa.binary()), None, "has no rows"),
        (pa.array([1, 2]), None, r"has no one column of images: use --column with one of \(none"),
        (pa.array(["a"]), "photo", "has no column 'photo' of images: use --column with one of image"),
    ],
)
def test_tables_without_images(values: Any, column: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_images(str(table(tmp_path / "x.parquet", values)), column)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("nothing", "holds no images"), ("no.parquet", "is no such table")])
def test_places_without_images(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_images(str(tmp_path / name))


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello, this is no Parquet")
    with pytest.raises(UsageError, match="--input .*x.parquet cannot be read: Parquet magic bytes not found"):
        open_images(str(tmp_path / "x.parquet"))


def test_the_output_must_be_a_table(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.parquet"):
        Parts(tmp_path / "out.csv", open_images(str(folder)), TASKS)


def test_the_plan_is_of_what_was_asked(engine: Engine, folder: Path, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "out.parquet", open_images(str(folder)), TASKS)
    with parts.held():
        assert json.loads((parts.folder / "run.json").read_text())["tasks"] == ["alpha", "beta"]
        assert [parts.range(part) for part in parts.pending()] == [(0, 5), (5, 10), (10, 13)]
