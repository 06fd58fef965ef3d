"""The adapter tensors of a batch: one adapter for every row, or a row's own.

Shapes: batch ``B``, adapter rows ``A`` (1 or ``B``), blocks ``L``, width ``D``, prompts ``P``, sequence
``S = prefix + N + P``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter, gate_values, taps_of
from gpt_serve.specs import BackboneSpec, Pool, Tap

KeysAndValues = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """What holds for every row of a batch and is known on the host, so that nothing is computed that nobody reads.

    Attributes:
        closed: (L-1,) whether the gate of blocks 0..L-2 is exactly 0 for all rows: prompts are read, never written.
        taps: what the heads of the rows read, together.
        layers: 1, or ``L - first_block`` where some rows have prompts of their own in each block.
        prompts: ``P``, the most of any row.
        tempered: whether some rows have temperatures other than 1.
        shifted: whether some rows have shifts other than 0.
        first_block: the block that prompts enter.
        trunk: how many of the first blocks compute images alone, the same for every task of an image.
        remembered: in how many blocks, from ``first_block``, the keys and values of all prompts are known.
    """

    closed: tuple[bool, ...]
    taps: tuple[Tap, ...]
    layers: int = 1
    prompts: int = 0
    tempered: bool = False
    shifted: bool = False
    first_block: int = 0
    trunk: int = 0
    remembered: int = 0

    @classmethod
    def of(cls, adapter: Adapter, depth: int) -> "Layout":
        """The layout of a stored adapter on a backbone of ``depth`` blocks; no keys and values are known yet."""
        tempered = _first(None if adapter.tau is None else adapter.tau != 1, depth)
        shifted = _first(None if adapter.shift is None else (adapter.shift != 0).flatten(1).any(dim=1), depth)
        return cls(
            closed=tuple((adapter.gates(depth) == 0).tolist()),
            taps=adapter.taps_of(depth),
            layers=adapter.prompt.shape[0] if adapter.prompt is not None else 1,
            prompts=adapter.prompts,
            tempered=tempered < depth,
            shifted=shifted < depth,
            first_block=adapter.first_block,
            trunk=min(adapter.first_block if adapter.prompts else depth, tempered, shifted),
        )

    @property
    def last(self) -> int:
        """The last block that a head reads; those behind it are not computed."""
        return max(tap.block for tap in self.taps)

    @property
    def entry(self) -> int:
        """The first block in which prompts are rows of the sequence: before it their keys and values are known."""
        return self.first_block + self.remembered

    @cached_property
    def constant(self) -> int:
        """In how many blocks, from ``first_block``, keys and values of the prompts are the adapter's own constants.

        These are deep prompts in every block whose predecessors only read them, and shallow ones until the first gate
        that is open. The last block reads them alone unless a head averages over them.
        """
        if not self.prompts:
            return 0
        reading = [*self.closed[self.first_block : self.last], self.reads_prompts_last]
        return reading.index(False) if False in reading else len(reading)

    @cached_property
    def reads_prompts_last(self) -> bool:
        """Whether the last block reads prompts without computing their rows: no head averages over them."""
        return all(tap.pool != "mean" for tap in self.taps)

    @cached_property
    def reads_class_token_last(self) -> bool:
        """Whether of the last block's rows the CLS row alone is read."""
        return all(tap.pool == "cls" for tap in self.taps if tap.block == self.last)

    @classmethod
    def joined(cls, layouts: Sequence["Layout"]) -> "Layout":
        """The layout of a batch of rows with ``layouts``, whose prompts enter the same block.

        Rows without prompts take nothing away from the others: they have no gate, no layer and no first block.
        """
        prompted = [layout for layout in layouts if layout.prompts]
        return cls(
            closed=tuple(all(gates) for gates in zip(*(layout.closed for layout in layouts), strict=True)),
            taps=tuple(dict.fromkeys(tap for layout in layouts for tap in layout.taps)),
            layers=max(layout.layers for layout in layouts),
            prompts=max(layout.prompts for layout in layouts),
            tempered=any(layout.tempered for layout in layouts),
            shifted=any(layout.shifted for layout in layouts),
            first_block=prompted[0].first_block if prompted else 0,
            trunk=min(layout.trunk for layout in layouts),
            remembered=min((layout.remembered for layout in prompted), default=0),
        )


@dataclass(frozen=True, eq=False)
class AdapterBatch:
    """The tensors of one adapter for every row (``A = 1``) or of one adapter per row (``A = B``).

    Attributes:
        prompt: (A, layers, P, D). One layer: the tokens enter block ``first_block`` and are carried on. More: each
            block from there has tokens of its own; those of the blocks whose keys and values are known are left out.
        gate: (A, L-1) in [0, 1], the gate of blocks 0..L-2; the last block has none.
        tau: (A, L) attention temperatures, clamped to [0.01, 10] on use; None when all are 1.
        shift: (A, L, 3, D), added after attention, before and after the MLP; None when all are 0.
        layout: what the host knows of all rows; it must agree with the tensors.
        deep: (A,) bool, which rows take fresh tokens in each block; None when ``prompt``'s layers say so for all.
        counts: (A,) int, prompts of each row when rows are padded to ``P``; None when every row has ``P``.
        kv: keys and values (A, P, H*d) of the prompts in the blocks from ``first_block``, see `prompted.remember`.
        images: (B,) int, which of the ``U`` images each row is about, where they are fewer; None for one image a row.
        patch_rows: (G,) int, the rows whose heads read every patch; None for all rows. Others get none.
    """

    prompt: Tensor
    gate: Tensor
    tau: Tensor | None
    layout: Layout
    shift: Tensor | None = None
    deep: Tensor | None = None
    counts: Tensor | None = None
    kv: KeysAndValues = ()
    images: Tensor | None = None
    patch_rows: Tensor | None = None

    @classmethod
    def single(
        cls,
        *,
        depth: int,
        width: int,
        pool: Pool,
        prompt: Tensor | None = None,
        gamma: Tensor | None = None,
        tau: Tensor | None = None,
        shift: Tensor | None = None,
        closed: Sequence[bool] | None = None,
        first_block: int = 0,
        taps: Sequence[Tap] = (),
        device: torch.device | str | None = None,
    ) -> "AdapterBatch":
        """Tensors that are being learned, as a batch of ``A = 1``; the values themselves are not looked at.

        Args:
            prompt: (1 or L - first_block, P, D), None for no prompts.
            gamma: (L - 1 - first_block,), see `gate_values`.
            tau: (L,), None for temperatures that are 1.
            shift: (L, 3, D), None for shifts that are 0.
            closed: like ``gamma``, which gates are known to be exactly 0; None for those that are 0 without ``gamma``.
            taps: what the head reads; none stands for the last block with ``pool``.
        """
        if prompt is None:
            prompt = torch.zeros(1, 0, width, device=device)
        layers, prompts = prompt.shape[:2]
        if closed is None:
            closed = [(layers > 1 and gamma is None) or not prompts] * (depth - 1 - first_block)
        learned = tau is not None or shift is not None
        return cls(
            prompt=prompt[None],
            gate=gate_values(
                gamma, depth=depth, prompts=prompts, deep=layers > 1, first_block=first_block, device=device
            )[None],
            tau=None if tau is None else tau[None],
            shift=None if shift is None else shift[None],
            layout=Layout(
                closed=(*[True] * first_block, *closed),
                taps=taps_of(taps, pool, depth=depth, prompts=prompts),
                layers=layers,
                prompts=prompts,
                tempered=tau is not None,
                shifted=shift is not None,
                first_block=first_block,
                trunk=0 if learned else first_block if prompts else depth,
            ),
        )

    @classmethod
    def of(cls, adapter: Adapter, spec: BackboneSpec, device: torch.device | str) -> "AdapterBatch":
        """A stored adapter's tensors on ``device``, ``A = 1``; it must agree with ``spec``."""
        layout = Layout.of(adapter, spec.depth)
        prompt = torch.zeros(1, 0, spec.width) if adapter.prompt is None else adapter.prompt
        return cls(
            prompt=prompt.to(device)[None],
            gate=adapter.gates(spec.depth).to(device)[None],
            tau=adapter.tau.to(device)[None] if adapter.tau is not None and layout.tempered else None,
            shift=adapter.shift.to(device)[None] if adapter.shift is not None and layout.shifted else None,
            layout=layout,
        )

    @property
    def prompts(self) -> int:
        """``P``, padding included."""
        return self.prompt.shape[2]

    def entering(self, index: int) -> Tensor:
        """(A, P, D): the tokens with which the prompts start, should block ``index`` be the first to carry them."""
        if self.layout.layers == 1:
            return self.prompt[:, 0]
        return self.prompt[:, index - self.layout.entry]

    def valid(self, body: int) -> Tensor | None:
        """(A, S) bool: which of ``body`` prefix and patch rows plus ``P`` prompt rows are real; None when all are."""
        if self.counts is None:
            return None
        position = torch.arange(self.prompts, device=self.prompt.device)
        prompts = position < self.counts[:, None]
        return torch.cat([prompts.new_ones(prompts.shape[0], body), prompts], dim=1)


def _first(unlike: Tensor | None, depth: int) -> int:
    """The first block of which ``unlike`` (L,) is true; ``depth`` when there is none."""
    found = [] if unlike is None else unlike.nonzero()[:, 0].tolist()
    return int(found[0]) if found else depth
