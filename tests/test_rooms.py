"""What one room alone may know stays there. Which room may import which is import-linter's to check (``make lint``)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpt_serve

PACKAGE = Path(gpt_serve.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


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
    assert {name.split("/")[0] for name in knowing} == {"cli"}, knowing


def test_attention_is_computed_in_one_file() -> None:
    assert [name_of(path) for path in MODULES if "scaled_dot_product_attention" in path.read_text()] == [
        "model/prompted.py"
    ]


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


def test_text_files_are_utf8_whatever_the_locale() -> None:
    """Without ``encoding``, a table with a label in another script cannot be written where the locale is Latin-1."""
    root = PACKAGE.parent
    silent = []
    for path in [*MODULES, *root.glob("export/**/*.py"), *root.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if called in ("read_text", "write_text") and "encoding" not in {word.arg for word in node.keywords}:  # type: ignore[attr-defined]
                silent.append(f"{path.relative_to(root)}:{node.lineno}")  # type: ignore[attr-defined]
    assert not silent
