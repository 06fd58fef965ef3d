"""Adapters in preallocated memory on the device, and batches gathered from there.

Nearly all that an adapter holds is rows as wide as the backbone: prompts, shifts, heads, remembered keys and values.
They lie in one tensor of rows, each adapter in an extent of its own, so that a batch of any mix is one gather (as
S-LoRA's unified memory pool, Sheng et al. 2023). Row 0 is zero and pads.

Shapes: batch rows ``A``, blocks ``L``, width ``D``, prompts ``P``, classes ``C``, taps ``K``.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.model.batch import AdapterBatch, Layout
from gpt_serve.model.heads import HeadForm, head_tensors
from gpt_serve.specs import BackboneSpec

MIN_ROWS_PER_SLOT = 8  # a slab has one slot for this many rows: adapters of 8 rows fill both
SHIFTS = 3  # vectors a block, see `prompted.block`


class Extents:
    """Free and taken extents of ``size`` units; extent ``(start, length)`` covers ``start`` to ``start + length - 1``.

    Not safe to share between threads: the owner holds a lock.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._by_start: list[tuple[int, int]] = [(0, size)] if size else []
        self._by_length: list[tuple[int, int]] = [(size, 0)] if size else []

    @property
    def free(self) -> int:
        """Units that are free, in however many pieces."""
        return sum(length for _, length in self._by_start)

    def take(self, length: int) -> int | None:
        """The start of ``length`` units in the smallest free extent that holds them; None when there is none."""
        place = bisect_left(self._by_length, (length, 0))
        if place == len(self._by_length):
            return None
        found, start = self._by_length[place]
        self._remove(start, found)
        if found > length:
            self._insert(start + length, found - length)
        return start

    def give_back(self, start: int, length: int) -> None:
        """Free what `take` returned."""
        place = bisect_left(self._by_start, (start, 0))
        if place < len(self._by_start) and self._by_start[place][0] == start + length:
            following = self._by_start[place]
            self._remove(*following)
            length += following[1]
        if place and sum(self._by_start[place - 1]) == start:
            previous = self._by_start[place - 1]
            self._remove(*previous)
            start, length = previous[0], previous[1] + length
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        insort(self._by_start, (start, length))
        insort(self._by_length, (length, start))

    def _remove(self, start: int, length: int) -> None:
        del self._by_start[bisect_left(self._by_start, (start, length))]
        del self._by_length[bisect_left(self._by_length, (length, start))]


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter as it enters a slab.

    Attributes:
        layout: what the host knows of it.
        form: the same of its head.
        rows: float32 (R, D): ``layers * P`` of prompts, ``3 L`` of shifts where there are any, then each tensor of the
            head, filled up to whole rows.
        scalars: float32 (2L - 1,): gates, temperatures.
    """

    layout: Layout
    form: HeadForm
    rows: Tensor
    scalars: Tensor

    @classmethod
    def of(cls, adapter: Adapter, spec: BackboneSpec, *, pinned: bool = False) -> "Packed":
        """Pack a stored adapter of the backbone ``spec``; ``pinned`` for asynchronous copies to a GPU."""
        layout = Layout.of(adapter, spec.depth)
        parts = [] if adapter.prompt is None else [adapter.prompt.flatten(0, 1)]
        if adapter.shift is not None and layout.shifted:
            parts.append(adapter.shift.flatten(0, 1))
        for tensor in head_tensors(adapter).values():
            parts.append(F.pad(tensor.flatten(), (0, -tensor.numel() % spec.width)).view(-1, spec.width))
        tau = torch.ones(spec.depth) if adapter.tau is None else adapter.tau
        rows, scalars = torch.cat(parts), torch.cat([adapter.gates(spec.depth), tau])
        form = HeadForm.of(adapter)
        return cls(layout, form, rows.pin_memory() if pinned else rows, scalars.pin_memory() if pinned else scalars)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.rows.nbytes + self.scalars.nbytes

    def extent(self, remembered: int = 0) -> int:
        """How many rows of a slab it takes, with keys and values of ``remembered`` blocks."""
        return len(self.rows) + 2 * remembered * self.layout.prompts


@dataclass(frozen=True, eq=False)
class Place:
    """Where one adapter lies in a slab: valid until the slab is told to free it.

    Attributes:
        slot: index of its gates and temperatures.
        form: of its head.
        start: its first row; prompts, shifts, the head, then keys and values of the remembered blocks.
        length: the number of its rows.
    """

    slab: "Slab"
    layout: Layout
    form: HeadForm
    slot: int
    start: int
    length: int

    @property
    def shifts(self) -> int:
        """The row where the shifts begin, if there are any."""
        return self.start + self.layout.layers * self.layout.prompts

    @property
    def kv(self) -> int:
        """The row where the remembered keys and values begin."""
        return self.start + self.length - 2 * self.layout.remembered * self.layout.prompts

    @property
    def head_start(self) -> int:
        """The row where the head begins."""
        return self.shifts + (SHIFTS * self.slab.depth if self.layout.shifted else 0)

    @cached_property
    def head_tensors(self) -> dict[str, Tensor]:
        """All tensors of the head by their names, views into the slab; see `gpt_serve.model.heads`."""
        first, tensors = self.head_start, {}
        for name, shape in self.form.shapes:
            size = math.prod(shape)
            behind = first + -(-size // self.slab.width)
            tensors[name] = self.slab.rows[first:behind].flatten()[:size].view(shape)
            first = behind
        return tensors

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (C, K*D), or (C, M) behind a decoder, and bias (C,) of the classifier, views into the slab."""
        return self.head_tensors["head.weight"], self.head_tensors["head.bias"]

    @cached_property
    def batch(self) -> AdapterBatch:
        """The adapter as a batch of ``A = 1``: views into the slab."""
        layout = self.layout
        kv = self.slab.rows[self.kv : self.kv + 2 * layout.remembered * layout.prompts]
        pairs = kv.view(layout.remembered, 2, 1, layout.prompts, self.slab.width)
        batch = self.unremembered
        return replace(
            batch,
            prompt=batch.prompt[:, layout.remembered if layout.layers > 1 else 0 :],
            layout=layout,
            kv=tuple((keys, values) for keys, values in pairs),
        )

    @property
    def unremembered(self) -> AdapterBatch:
        """`batch` without keys and values: from this they are computed."""
        layout, rows, width = self.layout, self.slab.rows, self.slab.width
        prompt = rows[self.start : self.shifts].view(layout.layers, layout.prompts, width)
        shift = rows[self.shifts : self.shifts + SHIFTS * self.slab.depth] if layout.shifted else rows[:0]
        gate, tau = self.slab.scalars[self.slot].tensor_split([self.slab.depth - 1])
        return AdapterBatch(
            prompt=prompt[None],
            gate=gate[None],
            tau=tau[None] if layout.tempered else None,
            shift=shift.view(1, -1, SHIFTS, width) if layout.shifted else None,
            layout=replace(layout, remembered=0),
        )


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
        """Bytes of the rows that adapters fill."""
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
        layout = replace(packed.layout, remembered=remembered)
        return Place(self, layout, packed.form, slot, start + 1, length)

    def free(self, place: Place) -> None:
        """Give room back; nobody may read it any more."""
        self._extents.give_back(place.start - 1, place.length)
        self._slots.give_back(place.slot, 1)

    def write(self, place: Place, packed: Packed) -> None:
        """Copy everything but the remembered keys and values; asynchronous from pinned memory."""
        self.rows[place.start : place.start + len(packed.rows)].copy_(packed.rows, non_blocking=True)
        self.scalars[place.slot].copy_(packed.scalars, non_blocking=True)

    def write_kv(self, place: Place, batch: AdapterBatch) -> None:
        """Copy the keys and values that `prompted.remember` computed, of the blocks that have room in ``place``."""
        row = place.kv
        for pair in list(batch.kv)[: place.layout.remembered]:
            for part in pair:
                self.rows[row : row + part.shape[1]].copy_(part[0])
                row += part.shape[1]


class _GatheredKV(Sequence[tuple[Tensor, Tensor]]):
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


def on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of numbers that the host knows; it does not wait until the device has computed what came before."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def gather(places: Sequence[Place]) -> AdapterBatch:
    """The adapters at ``places`` (of one slab) as a batch, a row for each; of one place for all, ``A = 1``.

    For row ``b``, prompt ``p`` and layer ``l`` of a deep adapter (others have one layer for all)::

        prompt[b, l, p] = rows[start[b] + l * count[b] + p]    if p < count[b] else 0
        shift[b] = rows[shifts[b] : shifts[b] + 3 * L]         or 0 for an adapter without

    Prompts must enter the same block. Keys and values that not all of them remember are not given.
    """
    if all(place is places[0] for place in places):
        return places[0].batch
    slab, layouts = places[0].slab, [place.layout for place in places]
    layout = Layout.joined(list(dict.fromkeys(layouts)))
    device = slab.rows.device
    numbers = [
        (place.slot, place.start, place.shifts if own.shifted else 0, place.kv, own.prompts, own.layers > 1)
        for place, own in zip(places, layouts, strict=True)
    ]
    slot, start, shifts, kv, count, is_deep = on_device(numbers, device).unbind(1)
    position = torch.arange(layout.prompts, device=device)
    inside = position < count[:, None]
    # A shallow adapter among deep ones gives its only layer to each of theirs.
    skipped = layout.remembered if layout.layers > 1 else 0
    layer = torch.arange(skipped, layout.layers, device=device) * (is_deep * count)[:, None]
    index = torch.where(inside[:, None], (start[:, None] + layer)[..., None] + position, 0)
    gate, tau = slab.scalars[slot].tensor_split([slab.depth - 1], dim=1)
    prompted = {own.layers > 1 for own in layouts if own.prompts}
    return AdapterBatch(
        prompt=slab.rows[index],
        gate=gate,
        tau=tau if layout.tempered else None,
        shift=_shifts(slab, shifts) if layout.shifted else None,
        layout=layout,
        deep=is_deep.bool() if len(prompted) > 1 else None,
        counts=count if len({own.prompts for own in layouts}) > 1 else None,
        kv=_GatheredKV(slab.rows, kv[:, None], count[:, None], inside, layout.remembered),
        patch_rows=_patch_rows(places, device),
    )


def gather_heads(places: Sequence[Place]) -> tuple[Tensor, Tensor]:
    """Weights (G, C, K*D) and biases (G, C) of the linear heads at ``places`` of one slab, which have one shape."""
    slab = places[0].slab
    classes, features = places[0].form.shapes[0][1]
    weights, biases = classes * features // slab.width, -(-classes // slab.width)
    start = on_device([place.head_start for place in places], slab.rows.device)
    rows = slab.rows[start[:, None] + torch.arange(weights + biases, device=slab.rows.device)]
    weight, bias = torch.split(rows, [weights, biases], dim=1)
    return weight.reshape(len(places), classes, features), bias.flatten(1)[:, :classes]


def _patch_rows(places: Sequence[Place], device: torch.device) -> Tensor | None:
    """Which rows' heads read every patch, (G,); None where all do, or none does."""
    rows = patch_readers(places)
    return on_device(rows, device) if 0 < len(rows) < len(places) else None


def patch_readers(places: Sequence[Place]) -> list[int]:
    """The rows whose heads read every patch, in the order in which a pass hands their patches on."""
    return [index for index, place in enumerate(places) if place.form.masks]


def _shifts(slab: Slab, start: Tensor) -> Tensor:
    """(A,) first rows, 0 for none, to (A, L, 3, D)."""
    offset = torch.arange(SHIFTS * slab.depth, device=start.device)
    index = torch.where(start[:, None] > 0, start[:, None] + offset, 0)
    return slab.rows[index].view(len(start), slab.depth, SHIFTS, slab.width)
