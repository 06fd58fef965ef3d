"""The engine's forward pass in onnxruntime."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.engine.engine import Row, TorchForward, normalized
from gpt_serve.engine.passes import PassPlanner, opened, shared
from gpt_serve.engine.slab import gather
from gpt_serve.export.session import Graph

TORCH_BELOW = 0.8
"""Share of a pass's work that torch must be able to leave out for closed gates, or else onnxruntime is faster."""


class OnnxForward:
    """Computes passes of prompts that enter the first block, with a serving graph, see `gpt_serve.engine.onnx_cache`.

    Args:
        graph: open on the bank's device.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Features (B, D) of one or more rows, in order."""
        adapter = gather([row.resident.place for row in rows])
        count, depth = len(rows), adapter.gate.shape[1] + 1
        inputs = {
            "images": normalized(rows, torch.device("cpu")),
            "prompt": F.pad(adapter.prompt, (0, 0, 0, max(0, 1 - adapter.prompts))).expand(count, -1, -1, -1),
            "counts": torch.full((1,), adapter.prompts) if adapter.counts is None else adapter.counts,
            "gate": adapter.gate,
            "tau": torch.ones(1, depth) if adapter.tau is None else adapter.tau,
            "mean_pool": adapter.mean_pool,
        }
        whole = {name: value.expand(count, *value.shape[1:]).cpu().numpy() for name, value in inputs.items()}
        return torch.from_numpy(self.graph.run(whole)).to(adapter.gate.device)


class FasterForward:
    """Chooses for each pass: torch leaves out rows behind closed gates, onnxruntime is faster at what is left.

    The graph takes prompts that enter the first block only; with others it is always torch.
    """

    def __init__(self, onnx: OnnxForward, torch: TorchForward, planner: PassPlanner) -> None:
        self.onnx, self.torch, self.planner = onnx, torch, planner

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Features (B, D) of one or more rows, in order."""
        kind = shared([row.resident.place.kind for row in rows])
        share = self.planner.image(kind) / self.planner.image(opened(kind))
        by_torch = kind.layers > 1 or kind.first_block > 0 or share < TORCH_BELOW
        return (self.torch if by_torch else self.onnx)(rows)
