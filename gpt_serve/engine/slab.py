"""Adapters in preallocated memory on the device, and batches gathered from there.

Nearly all that an adapter holds is rows as wide as the backbone: prompts, heads, remembered keys and values. They lie
in one tensor of rows, each adapter in an extent of its own, so that a batch of any mix is one gather (as S-LoRA's
unified memory pool, Sheng et al. 2023). Row 0 is zero and pads.

Shapes: batch rows ``A``, blocks ``L``, width ``D``, prompts ``P``, classes ``C``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.engine.extents import Extents
from gpt_serve.model.batch import AdapterBatch, Plan
from gpt_serve.specs import BackboneSpec

MIN_ROWS_PER_SLOT = 8  # a slab has one slot for this many rows: adapters of 8 rows fill both


@dataclass(frozen=True)
class Kind:
    """What of an adapter decides how much work its images are.

    Attributes:
        plan: which gates are exactly 0, and the pooling.
        layers: 1, or ``L - first_block`` for prompts of each block.
        prompts: ``P``.
        tempered: has temperatures of its own.
        remembered: of how many blocks, from ``first_block``, the keys and values of the prompts are kept.
        first_block: the block that the prompts enter.
    """

    plan: Plan
    layers: int
    prompts: int
    tempered: bool
    remembered: int = 0
    first_block: int = 0

    @classmethod
    def of(cls, adapter: Adapter, depth: int) -> "Kind":
        """Of a stored adapter, nothing remembered yet."""
        prompt, gamma, first = adapter.prompt, adapter.gamma, adapter.first_block
        layers, prompts = (1, 0) if prompt is None else prompt.shape[:2]
        closed = [layers > 1] * (depth - 1 - first) if gamma is None else (torch.sigmoid(gamma) == 0).tolist()
        plan = Plan((*[True] * first, *closed), adapter.pool)
        return cls(plan, layers, prompts, adapter.tau is not None, first_block=first)

    @property
    def constant(self) -> int:
        """In how many blocks, from ``first_block``, keys and values of the prompts are the adapter's own constants."""
        return self.plan.constant - self.first_block if self.prompts else 0


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter as it enters a slab.

    Attributes:
        rows: float32 (layers * P + C + ceil(C / D), D): prompts, head weight, head bias.
        scalars: float32 (2L - 1,): gates, temperatures.
    """

    kind: Kind
    classes: int
    rows: Tensor
    scalars: Tensor

    @classmethod
    def of(cls, adapter: Adapter, spec: BackboneSpec, *, pinned: bool = False) -> "Packed":
        """A stored adapter of the backbone ``spec``; ``pinned`` for asynchronous copies to a GPU."""
        kind = Kind.of(adapter, spec.depth)
        classes = len(adapter.head_bias)
        bias = F.pad(adapter.head_bias, (0, -classes % spec.width)).view(-1, spec.width)
        parts = [adapter.head_weight, bias]
        if adapter.prompt is not None:
            parts.insert(0, adapter.prompt.flatten(0, 1))
        gates, open_gate = spec.depth - 1 - kind.first_block, 0.0 if kind.layers > 1 else 1.0
        gate = torch.full((gates,), open_gate) if adapter.gamma is None else torch.sigmoid(adapter.gamma)
        gate = F.pad(gate, (kind.first_block, 0))
        tau = torch.ones(spec.depth) if adapter.tau is None else adapter.tau
        rows, scalars = torch.cat(parts), torch.cat([gate, tau])
        return cls(kind, classes, rows.pin_memory() if pinned else rows, scalars.pin_memory() if pinned else scalars)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scalars.nbytes

    def extent(self, remembered: int = 0) -> int:
        """Rows in a slab, with keys and values of that many blocks."""
        return len(self.rows) + 2 * remembered * self.kind.prompts


@dataclass(frozen=True, eq=False)
class Place:
    """Where one adapter lies in a slab: valid until the slab is told to free it.

    Attributes:
        slot: index of its gates and temperatures.
        start: its first row; prompts, head weight, head bias, then keys and values of the remembered blocks.
        length: its rows.
    """

    slab: "Slab"
    kind: Kind
    classes: int
    slot: int
    start: int
    length: int

    @cached_property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,), views into the slab."""
        first = self.start + self.kind.layers * self.kind.prompts
        rows, width = self.slab.rows, self.slab.width
        bias = rows[first + self.classes : first + self.classes + -(-self.classes // width)]
        return rows[first : first + self.classes], bias.flatten()[: self.classes]

    @cached_property
    def batch(self) -> AdapterBatch:
        """The adapter as a batch of ``A = 1``: views into the slab."""
        kind, rows, width = self.kind, self.slab.rows, self.slab.width
        prompt = rows[self.start : self.start + kind.layers * kind.prompts].view(kind.layers, kind.prompts, width)
        skipped = kind.remembered if kind.layers > 1 else 0
        memory = rows[self.memory : self.memory + 2 * kind.remembered * kind.prompts]
        pairs = memory.view(kind.remembered, 2, 1, kind.prompts, width)
        gate, tau = self.slab.scalars[self.slot].tensor_split([self.slab.depth - 1])
        return AdapterBatch(
            prompt=prompt[None, skipped:],
            gate=gate[None],
            tau=tau[None] if kind.tempered else None,
            mean_pool=torch.tensor([kind.plan.pool == "mean"], device=rows.device),
            plan=kind.plan,
            memory=tuple((keys, values) for keys, values in pairs),
            skipped=skipped,
            first_block=kind.first_block,
        )

    @property
    def memory(self) -> int:
        """The row where the remembered keys and values begin."""
        return self.start + self.length - 2 * self.kind.remembered * self.kind.prompts


class Slab:
    """Preallocated memory for adapters of one backbone. Not safe to share between threads: the bank holds a lock.

    Args:
        spec: of the backbone.
        nbytes: size of the rows; the gates and temperatures come on top (a few per mille).
        device: where it lies.
        dtype: of the rows; gates and temperatures stay float32.

    Attributes:
        rows: (R, D).
        scalars: (slots, 2L - 1) float32.
    """

    def __init__(
        self, spec: BackboneSpec, nbytes: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.depth, self.width = spec.depth, spec.width
        self.row_bytes = spec.width * dtype.itemsize
        count = max(1, nbytes // self.row_bytes)
        slots = max(1, count // MIN_ROWS_PER_SLOT)
        self.rows = torch.empty(count, spec.width, device=device, dtype=dtype)
        self.rows[0] = 0
        self.scalars = torch.empty(slots, 2 * spec.depth - 1, device=device)
        self._extents = Extents(count - 1)
        self._slots = Extents(slots)

    @property
    def capacity(self) -> int:
        """Rows that adapters may fill."""
        return self._extents.size

    @property
    def used_bytes(self) -> int:
        """Of the rows that adapters fill."""
        return (self._extents.size - self._extents.free) * self.row_bytes

    def reserve(self, packed: Packed, remembered: int) -> Place | None:
        """Room for an adapter and the keys and values of its first blocks; None when there is none."""
        length = packed.extent(remembered)
        start = self._extents.take(length)
        if start is None:
            return None
        slot = self._slots.take(1)
        if slot is None:
            self._extents.give_back(start, length)
            return None
        kind = replace(packed.kind, remembered=remembered)
        return Place(self, kind, packed.classes, slot, start + 1, length)

    def free(self, place: Place) -> None:
        """Give room back; nobody may read it any more."""
        self._extents.give_back(place.start - 1, place.length)
        self._slots.give_back(place.slot, 1)

    def write(self, place: Place, packed: Packed) -> None:
        """Copy everything but the remembered keys and values; asynchronous from pinned memory."""
        self.rows[place.start : place.start + len(packed.rows)].copy_(packed.rows, non_blocking=True)
        self.scalars[place.slot].copy_(packed.scalars, non_blocking=True)

    def write_memory(self, place: Place, batch: AdapterBatch) -> None:
        """Copy the keys and values that `prompted.remember` computed, of the blocks that have room in ``place``."""
        row = place.memory
        for pair in list(batch.memory)[: place.kind.remembered]:
            for part in pair:
                self.rows[row : row + part.shape[1]].copy_(part[0])
                row += part.shape[1]


class _Memory(Sequence[tuple[Tensor, Tensor]]):
    """Remembered keys and values of a batch, gathered block by block when the forward pass asks for them.

    Args:
        rows: of the slab.
        start: (A, 1), where each adapter's begin.
        count: (A, 1), its prompts.
        inside: (A, P), false where the prompts are padded.
        blocks: how many blocks all of them remember.
    """

    def __init__(self, rows: Tensor, start: Tensor, count: Tensor, inside: Tensor, blocks: int) -> None:
        self._rows, self._count, self._inside, self._blocks = rows, count, inside, blocks
        self._first = start + torch.arange(inside.shape[1], device=rows.device)

    def __len__(self) -> int:
        return self._blocks

    def __getitem__(self, block: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        keys, values = (self._first + (2 * block + part) * self._count for part in (0, 1))
        return self._gather(keys), self._gather(values)

    def _gather(self, index: Tensor) -> Tensor:
        return self._rows[torch.where(self._inside, index, 0)]


def gather(places: Sequence[Place]) -> AdapterBatch:
    """The adapters at ``places`` (of one slab) as a batch, a row for each; of one place for all, ``A = 1``.

    Prompts enter the same block, and are padded to the longest. Blocks that not all of them remember are not
    remembered.
    """
    if all(place is places[0] for place in places):
        return places[0].batch
    slab, kinds = places[0].slab, [place.kind for place in places]
    device = slab.rows.device
    deep = [kind.layers > 1 for kind in kinds]
    numbers = [
        (place.slot, place.start, place.memory, kind.prompts, kind.layers > 1, kind.plan.pool == "mean")
        for place, kind in zip(places, kinds, strict=True)
    ]
    slot, start, memory, count, is_deep, mean_pool = torch.tensor(numbers).to(device, non_blocking=True).unbind(1)
    remembered = min(kind.remembered for kind in kinds)
    layers = max(kind.layers for kind in kinds)
    skipped = remembered if layers > 1 else 0
    length = max(kind.prompts for kind in kinds)
    position = torch.arange(length, device=device)
    inside = position < count[:, None]
    # A shallow adapter among deep ones gives its only layer to each of theirs.
    layer = torch.arange(skipped, layers, device=device) * (is_deep * count)[:, None]
    index = torch.where(inside[:, None], (start[:, None] + layer)[..., None] + position, 0)
    gate, tau = slab.scalars[slot].tensor_split([slab.depth - 1], dim=1)
    return AdapterBatch(
        prompt=slab.rows[index],
        gate=gate,
        tau=tau if any(kind.tempered for kind in kinds) else None,
        mean_pool=mean_pool.bool(),
        plan=Plan.shared([kind.plan for kind in set(kinds)]),
        deep=is_deep.bool() if len(set(deep)) > 1 else None,
        counts=count if len({kind.prompts for kind in kinds}) > 1 else None,
        memory=_Memory(slab.rows, memory[:, None], count[:, None], inside, remembered),
        skipped=skipped,
        first_block=kinds[0].first_block,
    )
