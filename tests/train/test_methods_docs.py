"""docs/methods.md: its example works, and its table names every method. docs/parity.md: its tests are there."""

import re
from pathlib import Path

import pytest

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.methods import prompts as methods
from gpt_serve.train.methods.prompts import METHODS
from gpt_serve.train.recipes.recipe import make_recipe
from tests.train.conftest import Recorder

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_table_names_every_method() -> None:
    plain = [name for name in METHODS if not name.endswith("+shift")]
    table = DOCS[DOCS.index("| method |") :].split("\n\n")[0]
    assert re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE) == plain
    assert "`+shift` goes with each method that has prompts" in DOCS


def test_parity_names_tests_that_are_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs" / "parity.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_the_example_adds_a_method_that_is_trained_and_served(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(example, {})
    recipe = make_recipe("adamw", method="gated-prototypes", prompts=3, epochs=1, batch_size=8)
    assert train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, recipe), Recorder(), World()) is not None
    adapter = AdapterStore(tmp_path).load("colours").adapter
    assert adapter.method == "gated-prototypes" and adapter.gamma is not None and adapter.tau is None
    engine = Engine(tiny, AdapterStore(tmp_path))
    (result,) = engine.predict([("colours", open_dataset(str(colours), 0).test[0].read())])
    assert isinstance(result, Prediction)
