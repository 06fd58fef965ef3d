"""The engine's forward pass in onnxruntime."""

from collections.abc import Sequence

import onnxruntime as ort
import torch

from gpt_serve.bank import Resident
from gpt_serve.engine import Prediction, Row, normalized, slots_of
from gpt_serve.export.session import Graph, bank_inputs


class OnnxForward:
    """Computes mixed batches with a serving graph, see `gpt_serve.export.cache`; residents lie on the CPU."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._last: tuple[list[Resident], dict[str, ort.OrtValue]] = [], {}

    def __call__(self, rows: Sequence[Row]) -> list[Prediction]:
        """The answers of one or more rows, in order."""
        unique, slots = slots_of(rows)
        slot = torch.tensor(slots)
        images = normalized(rows, unique, slot)
        inputs = {"images": images.numpy(), "index": slot.numpy(), **self._bank(unique)}
        scores = torch.from_numpy(self.graph.probabilities(inputs))
        # A task's own classes come first; the padding up to the largest task has probability 0.
        return [
            Prediction(resident.task, resident.revision, resident.labels, row[: len(resident.labels)])
            for resident, row in zip((row.resident for row in rows), scores.unbind(), strict=True)
        ]

    def _bank(self, residents: list[Resident]) -> dict[str, ort.OrtValue]:
        """The stacked adapters on the graph's device; kept for the next batch, which often has the same tasks."""
        known, bank = self._last
        if residents != known:  # by identity: a new revision is another resident
            heads = [(resident.head_weight, resident.head_bias) for resident in residents]
            bank = self.graph.place(bank_inputs([resident.tensors for resident in residents], heads, self.graph))
            self._last = residents, bank
        return bank
