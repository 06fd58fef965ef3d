"""The adapters in ``adapters/``, for photographs and for the smaller backbone, are what their cards say."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.evaluate import evaluate_task
from gpt_serve.engine.segment import Segmentation
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import TINY

ADAPTERS = Path(__file__).parents[2] / "adapters"
TASKS = ("caltech101", "digits", "flowers")


@pytest.fixture(scope="module")
def engine(bundled: Backbone) -> Engine:
    return Engine(bundled, AdapterStore(ADAPTERS / bundled.name))


@pytest.fixture(params=["small", "bundled"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return request.getfixturevalue(request.param)


def folder_of(backbone: Backbone) -> Path:
    return ADAPTERS / backbone.name if backbone.name == TINY.name else ADAPTERS


def test_the_shipped_tasks_are_these(backbone: Backbone) -> None:
    masks = ["camvid"] if folder_of(backbone) == ADAPTERS else []
    assert AdapterStore(folder_of(backbone)).tasks() == sorted([*TASKS, *masks])


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_fits_its_backbone_and_its_card(backbone: Backbone, task: str) -> None:
    folder = folder_of(backbone)
    stored = AdapterStore(folder).load(task, backbone.spec)
    card = (folder / task / "README.md").read_text()
    assert f"`{stored.revision}`" in card
    assert f"{100 * stored.adapter.training['metrics']['test_accuracy']:.2f} %" in card


def test_photographs_are_recognised(small: Backbone, shared_data: Path) -> None:
    """Irises, which the smaller backbone takes for other flowers."""
    files = sorted((shared_data / "flowers12" / "test" / "iris").iterdir())[:5]
    with Engine(small, AdapterStore(ADAPTERS)) as engine:
        results = engine.predict([("flowers", file.read_bytes()) for file in files])
    assert [isinstance(result, Prediction) and result.top(1)[0][0] for result in results] == ["iris"] * 5


def test_the_mask_of_a_photograph(small: Backbone) -> None:
    """Sky above trees and a tower, as the README shows it."""
    store = AdapterStore(ADAPTERS)
    stored = store.load("camvid", small.spec)
    card = (ADAPTERS / "camvid" / "README.md").read_text()
    assert f"`{stored.revision}`" in card
    assert f"{100 * stored.adapter.training['metrics']['test_miou']:.2f} %" in card
    with Engine(small, store) as engine:
        photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
        (answer,) = engine.predict([("camvid", photo)])
    assert isinstance(answer, Segmentation) and answer.mask.shape == (427, 640)
    sky, building, tree = (answer.labels.index(label) for label in ("sky", "building", "tree"))
    assert (answer.mask[:20] == sky).mean() > 0.95 and (answer.mask[-40:, -100:] == tree).mean() > 0.9
    assert answer.mask[170, 200] == building


@pytest.mark.slow
@pytest.mark.parametrize(("task", "folder"), [("digits", None), ("flowers", "flowers12")])
def test_the_recorded_test_accuracy_is_measured_again(
    engine: Engine, request: pytest.FixtureRequest, task: str, folder: str | None
) -> None:
    source = "digits" if folder is None else str(request.getfixturevalue("shared_data") / folder)
    recorded = engine.bank.store.load(task).adapter.training["metrics"]["test_accuracy"]
    assert evaluate_task(engine, task, source)["accuracy"] == pytest.approx(recorded, abs=0.005)
