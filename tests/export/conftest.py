"""Graphs that several tests look at: each is exported once for all processes of a test run, which takes seconds."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.cli.main import main
from gpt_serve.export.graphs import Form, multi_graph, single_graph
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Pool
from tests.conftest import Once

ADAPTERS = Path(__file__).parents[2] / "adapters" / "mae-vit-tiny-32"


class Exporter:
    """`single_graph` and `multi_graph`, run once for the same arguments."""

    def __init__(self, once: Once) -> None:
        self.once = once

    def single(self, backbone: Backbone, adapter: Adapter, form: Form) -> ir.Model:
        return self._model([backbone.spec, adapter.to_bytes(), form], lambda: single_graph(backbone, adapter, form))

    def multi(self, backbone: Backbone, pool: Pool | None, deep: bool, form: Form) -> ir.Model:
        return self._model([backbone.spec, pool, deep, form], lambda: multi_graph(backbone, pool, deep, form))

    def _model(self, arguments: list[object], export: Callable[[], ir.Model]) -> ir.Model:
        """A model of the caller's own, which it may change."""
        name = f"graph-{hashlib.sha256(repr(arguments).encode()).hexdigest()[:16]}"
        return ir.load(self.once(name, lambda folder: ir.save(export(), folder / "graph.onnx")) / "graph.onnx")


@pytest.fixture(scope="session")
def exporter(once: Once) -> Exporter:
    return Exporter(once)


def run_export(*args: str) -> Result:
    """``gpt-serve export`` with the adapters that ship for the smaller backbone."""
    return CliRunner(catch_exceptions=False).invoke(
        main, ["export", "--adapters", str(ADAPTERS), *args], prog_name="gpt-serve"
    )


@pytest.fixture(scope="session")
def flowers_graph(once: Once) -> Path:
    """The shipped task ``flowers``, exported with the defaults."""

    def export(folder: Path) -> None:
        output = folder / "flowers.onnx"
        result = run_export("--task", "flowers", "--output", str(output), "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        summary: dict[str, Any] = json.loads(result.stdout)
        assert summary["task"] == "flowers" and summary["output"] == str(output)

    return once("flowers", export) / "flowers.onnx"


@pytest.fixture(scope="session")
def shipped_graph(once: Once) -> Path:
    """Two shipped tasks in one graph, to which the third was added, with the bank folder beside it.

    What the first of these commands said is in ``multi.txt``.
    """

    def export(folder: Path) -> None:
        output = folder / "multi.onnx"
        result = run_export("--tasks", "digits, flowers", "--output", str(output))
        assert (result.exit_code, result.stderr) == (0, "")
        output.with_suffix(".txt").write_text(result.stdout)
        added = run_export("--task", "caltech101", "--add-to", str(output))
        assert (added.exit_code, added.stderr) == (0, "")

    return once("shipped", export) / "multi.onnx"
