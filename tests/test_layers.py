"""Imports only point down, and what one file alone may know stays there."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpt_serve

PACKAGE = Path(gpt_serve.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "extents", "memory", "specs"},
    {"adapter", "adapter_file", "backbone", "checkpoints", "image_headers", "images"},
    {"adapter_batch", "bank", "host", "passes", "prompted", "slab", "store"},
    {"engine", "evaluation", "export", "scheduler", "train"},
    {
        "bench",
        "cli",
        "insight_commands",
        "options",
        "serve",
        "sweep_commands",
        "terminal",
        "train_commands",
        "training_options",
    },
]
LAYER_OF = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# Neighbours within a layer: importer, imported.
NEIGHBOURS = {
    ("specs", "errors"),
    ("adapter", "adapter_file"),
    ("backbone", "checkpoints"),
    ("images", "image_headers"),
    ("bank", "host"),
    ("bank", "prompted"),
    ("bank", "slab"),
    ("bank", "store"),
    ("host", "slab"),
    ("host", "store"),
    ("passes", "adapter_batch"),
    ("passes", "slab"),
    ("slab", "adapter_batch"),
    ("prompted", "adapter_batch"),
    ("evaluation", "engine"),
    ("evaluation", "train"),
    ("export", "engine"),
    ("export", "train"),
    ("scheduler", "engine"),
    ("bench", "serve"),
    ("cli", "bench"),
    ("cli", "insight_commands"),
    ("cli", "options"),
    ("cli", "serve"),
    ("cli", "sweep_commands"),
    ("cli", "terminal"),
    ("cli", "train_commands"),
    ("insight_commands", "options"),
    ("insight_commands", "terminal"),
    ("sweep_commands", "options"),
    ("sweep_commands", "training_options"),
    ("sweep_commands", "terminal"),
    ("train_commands", "options"),
    ("train_commands", "training_options"),
    ("training_options", "options"),
    ("train_commands", "terminal"),
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path: Path) -> str:
    """The module or subpackage directly below ``gpt_serve`` that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute dotted names, imports inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively: spell the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_units(path: Path) -> set[str]:
    """What ``path`` imports of this package, as units; ``gpt_serve.__version__`` belongs to none."""
    names = {name.split(".")[1] for name in imported_modules(path) if name.startswith("gpt_serve.")}
    return names - {"__version__", unit_of(path)}


INSIDE = [path for path in MODULES if path != PACKAGE / "__init__.py"]  # the package's own file only loads lazily


def test_every_module_has_a_layer() -> None:
    assert {unit_of(path) for path in INSIDE} <= set(LAYER_OF)


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    for other in imported_units(path):
        assert other in LAYER_OF, f"{name_of(path)} imports {other}, which has no layer: name a module of LAYERS"
        allowed = LAYER_OF[other] < LAYER_OF[unit] or (unit, other) in NEIGHBOURS
        assert allowed, f"{name_of(path)} (layer {LAYER_OF[unit]}) imports {other} (layer {LAYER_OF[other]})"


def test_every_listed_neighbour_is_one() -> None:
    real = {(unit_of(path), other) for path in INSIDE for other in imported_units(path)}
    assert real >= NEIGHBOURS
    assert all(LAYER_OF[importer] == LAYER_OF[imported] for importer, imported in NEIGHBOURS)


def exits(path: Path) -> set[str]:
    """Mentions of ``SystemExit``, ``sys.exit``, ``ctx.exit`` and the builtins ``exit`` and ``quit``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and node.id in ("SystemExit", "exit", "quit"):
            found.add(node.id)
        if isinstance(node, ast.Attribute) and node.attr == "exit":
            found.add(ast.unparse(node))
    return found


def test_only_the_command_line_knows_exit_codes() -> None:
    knowing = {name_of(path): names for path in MODULES if (names := exits(path))}
    assert set(knowing) == {"cli.py"}, knowing


def test_only_the_server_knows_http() -> None:
    web = {"fastapi", "litserve", "starlette", "uvicorn", "http"}
    knowing = set()
    for path in MODULES:
        # The benchmark asks a server over HTTP; `http.client` does not make it one.
        names = [name for name in imported_modules(path) if name != "http.client"]
        knowing |= {unit_of(path) for name in names if name.split(".")[0] in web}
    assert knowing == {"serve"}


def test_attention_is_computed_in_one_file() -> None:
    assert [name_of(path) for path in MODULES if "scaled_dot_product_attention" in path.read_text()] == ["prompted.py"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize(
    "program",
    [
        "import gpt_serve",
        "from gpt_serve.cli.main import main; main(['--help'], standalone_mode=False)",
        "from gpt_serve.cli.main import main; main(['train', '--help'], standalone_mode=False)",
        "from gpt_serve.cli.main import main; main(['sweep', '--help'], standalone_mode=False)",
    ],
)
def test_starting_up_imports_nothing_heavy(program: str) -> None:
    heavy = "{'torch', 'torchvision', 'timm', 'litserve', 'fastapi', 'sklearn', 'matplotlib', 'onnxruntime', 'ray'}"
    check = f"import sys; sys.exit(str(sorted({heavy} & set(sys.modules))) if {heavy} & set(sys.modules) else 0)"
    run = subprocess.run([sys.executable, "-c", f"{program}\n{check}"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
