import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import gpt_serve
from gpt_serve import errors


def test_all_is_pinned() -> None:
    assert gpt_serve.__all__ == [
        "Adapter",
        "AdapterStore",
        "Backbone",
        "Engine",
        "GPTServeError",
        "Prediction",
        "Segmentation",
        "__version__",
    ]


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("Adapter", "adapters.adapter"),
        ("AdapterStore", "adapters.store"),
        ("Backbone", "model.backbone"),
        ("Engine", "engine.engine"),
        ("GPTServeError", "errors"),
        ("Prediction", "engine.classify"),
    ],
)
def test_attributes_load_on_first_use(name: str, home: str) -> None:
    assert getattr(gpt_serve, name) is getattr(import_module(f"gpt_serve.{home}"), name)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'gpt_serve' has no attribute 'Enginee'"):
        gpt_serve.Enginee  # noqa: B018


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert gpt_serve.__version__ == project["version"]


def error_classes() -> list[type]:
    return [item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__]


def drawn_parents(drawing: str) -> dict[str, str | None]:
    """Class name to parent name, from the tree in a docstring: four characters of indentation per level."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for branch, name in re.findall(r"^    ((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)(?:  .*)?$", drawing, re.MULTILINE):
        level = len(branch) // 4
        assert level <= len(path), f"{name} hangs in the air"
        assert name not in parents, f"{name} is drawn twice"
        path = path[:level]
        parents[name] = path[-1] if path else None
        path.append(name)
    return parents


def test_every_error_derives_from_the_base() -> None:
    assert error_classes()
    assert all(issubclass(item, errors.GPTServeError) for item in error_classes())


def test_the_drawn_error_tree_is_the_real_one() -> None:
    real = {item.__name__: None if item is errors.GPTServeError else item.__base__.__name__ for item in error_classes()}
    assert drawn_parents(inspect.getdoc(errors) or "") == real


def test_every_error_says_what_it_means() -> None:
    assert all(item.__doc__ for item in error_classes())
