from pathlib import Path

import pytest

from gpt_serve.backbone import Backbone
from gpt_serve.export import ExportOptions, export_task, export_tasks
from gpt_serve.store import AdapterStore

STORE = AdapterStore(Path(__file__).parents[2] / "adapters")


@pytest.fixture(scope="session")
def flowers_graph(bundled: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped task ``flowers``, exported with the defaults; takes ten seconds."""
    path = tmp_path_factory.mktemp("exported") / "flowers.onnx"
    export_task(bundled, STORE, "flowers", path)
    return path


@pytest.fixture(scope="session")
def multi_graph(bundled: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three shipped tasks in one graph, with the bank folder beside it; takes twenty seconds."""
    path = tmp_path_factory.mktemp("exported") / "multi.onnx"
    export_tasks(bundled, STORE, ["flowers", "caltech101", "digits"], path, ExportOptions())
    return path
