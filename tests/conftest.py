import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Commands and servers of the tests take the smaller backbone where they name none: before anything reads the default.
os.environ["GPT_SERVE_BACKBONE"] = "mae-vit-tiny-32"

import pytest
import torch
from filelock import FileLock

from gpt_serve.engine.onnx import serving_graph
from gpt_serve.export.session import Graph
from gpt_serve.model.backbone import Backbone
from tests.tiny_vit import tiny_backbone

if TYPE_CHECKING:  # boto3 takes seconds to import
    from tests.s3 import S3

# The models here are small: more threads only fight each other and the server processes of other tests.
torch.set_num_threads(1)


SLOW = {"server", "shipped_server", "flowers_graph", "shipped_graph"}
"""Fixtures that take seconds, so that what uses them is marked ``slow``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and begin with the files that hold it: at the end one process would wait for the other."""
    for item in items:
        if SLOW & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Once:
    """``once(name, make)`` is a folder that ``make`` has filled, once for all processes of this test run."""

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared_folder / name, shared_folder / f"{name}.done"
        with FileLock(shared_folder / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session", autouse=True)
def cache(shared_folder: Path) -> Iterator[Path]:
    """Where graphs are kept, by the tests and the servers that they start: each is built once for all."""
    folder = shared_folder / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def bundled() -> Backbone:
    """The smaller backbone that ships with the package: 12 blocks, width 192, 32x32 input, mean pooling."""
    return Backbone.load("mae-vit-tiny-32")


@pytest.fixture(scope="session")
def small() -> Backbone:
    """The larger one: 12 blocks, width 384, patches of 14x14, CLS pooling. Shared: don't change it."""
    return Backbone.load("vit-small-14")


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """A random ViT: 3 blocks, width 24, 16x16 input, 16 patches, CLS token, mean pooling. Shared: don't change it."""
    return tiny_backbone()


@pytest.fixture(scope="session")
def tiny_graph(tiny: Backbone, cache: Path) -> Graph:
    """What a server with the onnx engine would run for `tiny`; takes seconds."""
    with FileLock(cache / "tiny.lock"):
        return serving_graph(tiny)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Image folders beside the repository; tests that need them skip where they are absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the image folders in ../shared/data")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3"]:
    from tests.s3 import S3

    server = S3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: "S3", monkeypatch: pytest.MonkeyPatch) -> "S3":
    """An S3 server that the environment leads to, with an empty bucket ``models``."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    s3_server.client.create_bucket(Bucket="models")
    for page in s3_server.client.get_paginator("list_objects_v2").paginate(Bucket="models"):
        for entry in page.get("Contents", ()):
            s3_server.client.delete_object(Bucket="models", Key=entry["Key"])
    s3_server.calls.clear()
    return s3_server
