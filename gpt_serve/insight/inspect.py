"""What an adapter has learned: gates, temperatures and the selection ratio of each block."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.insight.figures import save_figure
from gpt_serve.model.prompted import TAU_MAX, TAU_MIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Inspection:
    """Per-block values, block 1 first; None where the method does not learn them.

    Attributes:
        gates: ``sigmoid(gamma)`` of blocks 1..L-1; 0 before the block that prompts enter.
        temperatures: tau of blocks 1..L.
        selection_ratio: influence of blocks 1..L-1 on the last block's prompts (Eq. 11); sums to 1. None when
            every gate is closed: then no block has any.
        shifts: the Euclidean norm of the three vectors that blocks 1..L add.
        taps: what the head reads, [block, pooling] each; None for the last block alone.
    """

    gates: list[float] | None
    temperatures: list[float] | None
    selection_ratio: list[float] | None
    shifts: list[float] | None = None
    taps: list[list[int | str]] | None = None


def selection_ratio(gates: Tensor) -> Tensor | None:
    """Eqs. 10 and 11: ``r_l = w_l / sum(w)`` with ``w_l = g_l * prod_{m > l} (1 - g_m)``.

    Args:
        gates: (L-1,) in [0, 1].

    Returns:
        (L-1,) summing to 1, or None when all weights are 0.
    """
    keep = torch.cat([1 - gates[1:], gates.new_ones(1)]).flip(0).cumprod(0).flip(0)
    weights = gates * keep
    total = weights.sum()
    return None if total == 0 else weights / total


def inspect_adapter(adapter: Adapter) -> Inspection:
    """What a stored adapter has learned besides its head, and what its head reads."""
    gates = None
    if adapter.gamma is not None:
        depth = len(adapter.gamma) + 1 + adapter.first_block
        gates = dataclasses.replace(adapter, gamma=adapter.gamma.double()).gates(depth)
    ratio = None if gates is None or adapter.deep or not len(gates) else selection_ratio(gates)
    return Inspection(
        gates=None if gates is None else gates.tolist(),
        temperatures=None if adapter.tau is None else adapter.tau.clamp(TAU_MIN, TAU_MAX).tolist(),
        selection_ratio=None if ratio is None else ratio.tolist(),
        shifts=None if adapter.shift is None else adapter.shift.flatten(1).norm(dim=1).tolist(),
        taps=[[tap.block + 1, tap.pool] for tap in adapter.taps] or None,
    )


def plot_inspection(inspection: Inspection, title: str, path: Path) -> None:
    """Write gates, temperatures and selection ratio by block (Fig. 4 of the paper) as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    _bars(panels[0], inspection.gates, "gate g")
    panels[0].set_ylim(0, 1)
    _bars(panels[1], inspection.temperatures, "temperature τ")
    panels[1].axhline(1, color="0.5", linewidth=0.8)
    _bars(panels[2], inspection.selection_ratio, "selection ratio r")
    save_figure(figure, path, dpi=110)


def _bars(axes: "Axes", values: list[float] | None, name: str) -> None:
    axes.set_title(name if values is not None else f"{name}: none")
    axes.set_xlabel("block")
    if values is not None:
        axes.bar(range(1, len(values) + 1), values)
        axes.set_xticks(range(1, len(values) + 1))
