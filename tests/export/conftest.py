import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpt_serve.cli.main import main
from gpt_serve.model.backbone import Backbone

ADAPTERS = Path(__file__).parents[2] / "adapters"


def run_export(*args: str) -> Result:
    """``gpt-serve export`` with the adapters that ship."""
    return CliRunner(catch_exceptions=False).invoke(
        main, ["export", "--adapters", str(ADAPTERS), *args], prog_name="gpt-serve"
    )


@pytest.fixture(scope="session")
def flowers_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped task ``flowers``, exported with the defaults."""
    output = tmp_path_factory.mktemp("flowers") / "flowers.onnx"
    result = run_export("--task", "flowers", "--output", str(output), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    summary: dict[str, Any] = json.loads(result.stdout)
    assert summary["task"] == "flowers" and summary["output"] == str(output)
    return output


@pytest.fixture(scope="session")
def multi_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Two shipped tasks in one graph, to which the third was added; and what the first of these commands said."""
    output = tmp_path_factory.mktemp("multi") / "multi.onnx"
    result = run_export("--tasks", "digits, flowers", "--output", str(output))
    added = run_export("--task", "caltech101", "--add-to", str(output))
    assert (added.exit_code, added.stderr) == (0, "")
    return output, result


@pytest.fixture(scope="session")
def multi_graph(multi_export: tuple[Path, Result], bundled: Backbone) -> Path:
    """The three shipped tasks in one graph, with the bank folder beside it."""
    return multi_export[0]
