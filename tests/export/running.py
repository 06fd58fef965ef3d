"""Open graphs that were made in memory."""

from pathlib import Path

import onnx_ir as ir

from gpt_serve.export.files import save
from gpt_serve.export.session import FORMAT, Graph


def open_graph(model: ir.Model, folder: Path, output: str = "probabilities") -> Graph:
    """``model`` with the metadata that it takes to be opened."""
    path = folder / "graph.onnx"
    save(model, path, {"format": FORMAT, "output": output})
    return Graph(path, threads=1)
