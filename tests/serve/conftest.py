import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter
from tests.serve.harness import ServerProcess, serving, until


@pytest.fixture(scope="session")
def spec(bundled: Backbone) -> BackboneSpec:
    return bundled.spec


def encode(seed: int, kind: str = "PNG", size: tuple[int, int] = (40, 40)) -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def image() -> bytes:
    return encode(0)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, spec: BackboneSpec) -> Path:
    """A store with two good tasks."""
    root = tmp_path_factory.mktemp("adapters")
    for number, task in enumerate(("birds", "cars")):
        AdapterStore(root).publish(make_adapter(spec, task, seed=number))
    return root


@pytest.fixture(scope="session")
def server(adapters: Path) -> Iterator[ServerProcess]:
    """An ordinary server; tests add their own tasks to its store."""
    yield from serving(adapters)


@pytest.fixture(scope="session")
def stub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from serving(tmp_path_factory.mktemp("stub"), stub=True, queue_limit=16)


@pytest.fixture
def stub(stub_server: ServerProcess) -> ServerProcess:
    """A server with 16 slots around a stub, see entry.py; ready and idle when a test gets it."""
    until(lambda: stub_server.in_flight() == 0)
    stub_server.wait_ready()
    return stub_server
