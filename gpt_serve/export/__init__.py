"""ONNX graphs of adapters, folded and verified; see ``graphs`` for their inputs and ``session`` for running them.

Attributes load on first use: a server that runs a kept graph needs none of what builds one.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gpt_serve.errors import ExportError

if TYPE_CHECKING:
    from gpt_serve.export.job import ExportOptions, add_task, export_task, export_tasks
    from gpt_serve.export.session import Graph

__all__ = ["ExportOptions", "Graph", "add_task", "export_task", "export_tasks"]

_HOMES = {
    "ExportOptions": "job",
    "Graph": "session",
    "add_task": "job",
    "export_task": "job",
    "export_tasks": "job",
}

for _name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):
    if find_spec(_name) is None:
        raise ExportError(f"ONNX graphs need {_name}: pip install onnx onnxscript onnxruntime-gpu")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
