"""ONNX graphs of adapters, folded and verified; see ``graphs`` for their inputs and ``session`` for running them."""

from gpt_serve.errors import ExportError

try:
    import onnx as _onnx  # noqa: F401
    import onnx_ir as _onnx_ir  # noqa: F401
    import onnxruntime as _onnxruntime  # noqa: F401
    import onnxscript as _onnxscript  # noqa: F401
except ModuleNotFoundError as error:
    raise ExportError(f"ONNX graphs need {error.name}: pip install onnx onnxscript onnxruntime-gpu") from error

from gpt_serve.export.job import ExportOptions, add_task, export_task, export_tasks
from gpt_serve.export.session import Graph

__all__ = ["ExportOptions", "Graph", "add_task", "export_task", "export_tasks"]
