"""Bulk prediction on Ray without Ray: what each actor does, and what the command makes of it."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gpt_serve.bulk import parts as parts_module
from gpt_serve.bulk.inputs import open_images
from gpt_serve.bulk.parts import Parts
from gpt_serve.bulk.predict import predict_in_bulk
from gpt_serve.cli.main import main
from gpt_serve.cluster import bulk
from gpt_serve.cluster.bulk import Predictor, Work, actors, predict_on_ray
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import DataError, GPTServeError, UnknownTask, UsageError
from gpt_serve.model.backbone import Backbone
from tests.factories import make_engine
from tests.serve.conftest import encode

TASKS = ("alpha", "beta")


@pytest.fixture
def engine(tiny: Backbone, tmp_path: Path) -> Engine:
    return make_engine(tiny, tmp_path / "adapters", TASKS, max_batch=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(12):
        (root / f"{number:02}.png").write_bytes(encode(number))
    (root / "broken.png").write_bytes(b"broken")
    return root


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of 5 images, which come back from the last one to the first; which were computed."""
    computed: list[int] = []

    @contextmanager
    def cluster(address: str) -> Iterator[list[dict[str, float]]]:
        yield [{"CPU": 2.0}]

    def rows(work: Work, parts: Parts, pending: list[int], *_: Any) -> Iterator[dict[str, Any]]:
        actor = Predictor(work, parts.identity)
        for part in reversed(pending):
            start, stop = parts.range(part)
            answer = actor({"part": [part], "start": [start], "stop": [stop]})
            computed.append(part)
            yield {name: value for name, (value,) in pickle.loads(pickle.dumps(answer)).items()}

    monkeypatch.setattr(parts_module, "PART", 5)
    monkeypatch.setattr(bulk, "ray_cluster", cluster)
    monkeypatch.setattr(bulk, "_rows", rows)
    return computed


def run(engine: Engine, folder: Path, output: Path, told: Any = lambda count: None) -> list[dict[str, Any]]:
    work = Work(lambda: engine, TASKS, str(folder), None)
    predict_on_ray("auto", "cpu", work, Parts(output, open_images(str(folder)), TASKS), told)
    return pq.read_table(output).to_pylist()


def test_the_rows_are_those_of_one_machine(engine: Engine, folder: Path, tmp_path: Path) -> None:
    images, told = open_images(str(folder)), []
    predict_in_bulk(engine, TASKS, images, Parts(tmp_path / "here.parquet", images, TASKS), lambda count: None)
    there = run(engine, folder, tmp_path / "there.parquet", told.append)
    here = pq.read_table(tmp_path / "here.parquet").to_pylist()
    assert [row | {"probability": None} for row in there] == [row | {"probability": None} for row in here]
    assert len(there) == 26 and sum(row["error"] is not None for row in there) == 2
    assert told == [0, 3, 5, 5]


def test_a_run_that_one_machine_began_is_continued(
    engine: Engine, folder: Path, tmp_path: Path, in_this_process: list[int]
) -> None:
    images, output = open_images(str(folder)), tmp_path / "out.parquet"

    def stop_in_the_second_part(count: int) -> None:
        if (tmp_path / ".out.parquet.parts" / "part-000000.parquet").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_in_bulk(engine, TASKS, images, Parts(output, images, TASKS), stop_in_the_second_part)
    assert len(run(engine, folder, output)) == 26
    assert in_this_process == [2, 1]


def test_a_machine_with_other_images_is_known_before_anything_is_computed(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    parts = Parts(tmp_path / "out.parquet", open_images(str(folder)), TASKS)
    (folder / "new.png").write_bytes(encode(20))
    with pytest.raises(DataError, match="does not hold the images of the machine that runs the command"):
        predict_on_ray("auto", "cpu", Work(lambda: engine, TASKS, str(folder), None), parts, lambda count: None)
    assert not parts.output.exists()


def raising(error: GPTServeError) -> Engine:
    raise error


def test_errors_of_actors_keep_their_kind(folder: Path, tmp_path: Path) -> None:
    work = Work(partial(raising, UnknownTask("unknown task 'x'")), TASKS, str(folder), None)
    with pytest.raises(UnknownTask, match="unknown task 'x'"):
        predict_on_ray("auto", "auto", work, Parts(tmp_path / "o.parquet", open_images(str(folder)), TASKS), print)


@pytest.mark.parametrize(
    ("machines", "device", "expected"),
    [
        ([{"CPU": 8.0}], "auto", (1, {"num_cpus": 8})),
        ([{"CPU": 0.0}, {"CPU": 1.0}, {"CPU": 1.0}], "cpu", (2, {"num_cpus": 1})),
        ([{"CPU": 16.0}, {"CPU": 4.0}], "cpu", (5, {"num_cpus": 4})),  # the large one holds four
        ([{"CPU": 64.0}, {"CPU": 16.0, "GPU": 2.0}], "auto", (2, {"num_cpus": 8, "num_gpus": 1})),
    ],
)
def test_actors_fill_the_machines(machines: list[dict[str, float]], device: str, expected: Any) -> None:
    assert actors(machines, device) == expected


@pytest.mark.parametrize(
    ("machines", "device", "line"), [([{"CPU": 4.0}], "cuda", "sees no GPU"), ([{"CPU": 0.0}], "cpu", "sees no core")]
)
def test_clusters_that_cannot_compute(machines: list[dict[str, float]], device: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        actors(machines, device)


def predict(*args: str) -> Result:
    return CliRunner().invoke(main, ["predict", "--task", "alpha", "--ray-address", "auto", *args])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["a.png"], "--ray-address is for --input with --output: leave it out"),
        (["--task", "nobody"], "unknown task 'nobody'"),
        (["--device", "cuda:1"], "--device cuda:1: Ray chooses among the GPUs of its machines: use auto, cpu or cuda"),
    ],
)
def test_mistakes_are_one_line(args: list[str], line: str, engine: Engine, folder: Path, tmp_path: Path) -> None:
    places = ["--input", str(folder), "--output", str(tmp_path / "out.parquet")] if args[0].startswith("-") else []
    result = predict(*args, *places, "--adapters", str(tmp_path / "adapters"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert line in result.stderr and result.stderr.count("\n") == 1
