"""The adapter tensors of a batch: one adapter for every row, or a row's own.

Shapes: batch ``B``, adapter rows ``A`` (1 or ``B``), blocks ``L``, width ``D``, prompts ``P``, sequence
``S = prefix + N + P``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.specs import BackboneSpec, Pool

Memory = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Plan:
    """What holds for every row and is known on the host, so that rows which nobody reads are not computed.

    Attributes:
        closed: (L-1,) whether the gate of blocks 0..L-2 is exactly 0 for all: prompts are read, never written. True
            before the block that they enter.
        pool: the pooling of all rows; None when they differ or are known only on the device.
    """

    closed: tuple[bool, ...]
    pool: Pool | None

    @property
    def constant(self) -> int:
        """How many of the first blocks only read the prompts, while these are the adapter's own constants."""
        reading = [*self.closed, self.pool == "cls"]
        return reading.index(False) if False in reading else len(reading)

    @classmethod
    def shared(cls, plans: Sequence["Plan"]) -> "Plan":
        """What holds for all of ``plans``."""
        pools = {plan.pool for plan in plans}
        closed = tuple(all(gates) for gates in zip(*(plan.closed for plan in plans), strict=True))
        return cls(closed, pools.pop() if len(pools) == 1 else None)


@dataclass(frozen=True, eq=False)
class AdapterBatch:
    """The tensors of one adapter for every row (``A = 1``) or of one adapter per row (``A = B``).

    Attributes:
        prompt: (A, 1 or L - first_block, P, D). One layer: the tokens enter block ``first_block`` and are carried on.
            More: each block from there has tokens of its own.
        gate: (A, L-1) in [0, 1], the gate of blocks 0..L-2; the last block has none; 0 before ``first_block``.
        tau: (A, L) attention temperatures, clamped to [0.01, 10] on use; None when all are 1.
        mean_pool: (A,) bool; mean over patches and prompts where true, the CLS row where false.
        plan: what the host knows of all rows; it must agree with ``gate`` and ``mean_pool``.
        deep: (A,) bool, which rows take fresh tokens in each block; None when ``prompt``'s layers say so for all.
        counts: (A,) int, prompts of each row when rows are padded to ``P``; None when every row has ``P``.
        memory: keys and values (A, P, H*d) of the prompts in the blocks from ``first_block``, see `prompted.remember`.
        skipped: layers that ``prompt`` leaves out because ``memory`` stands for them; 0 when it has one layer for all.
        first_block: the block that the prompts enter, the same for all rows; those before compute images alone.
    """

    prompt: Tensor
    gate: Tensor
    tau: Tensor | None
    mean_pool: Tensor
    plan: Plan
    deep: Tensor | None = None
    counts: Tensor | None = None
    memory: Memory = ()
    skipped: int = 0
    first_block: int = 0

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
        closed: Sequence[bool] | None = None,
        first_block: int = 0,
        device: torch.device | str | None = None,
    ) -> "AdapterBatch":
        """One adapter as a batch of ``A = 1``; ``gate = sigmoid(gamma)`` (Eq. 6).

        Args:
            prompt: (1 or L - first_block, P, D), None for no prompts.
            gamma: (L - 1 - first_block,), None for gates that are 1 (shallow prompts) or 0 (deep prompts).
            tau: (L,), None for temperatures that are 1.
            closed: like ``gamma``, which gates are known to be exactly 0; None for those that are 0 without ``gamma``.
        """
        if prompt is None:
            prompt = torch.zeros(1, 0, width, device=device)
        deep = prompt.shape[0] > 1
        gates = depth - 1 - first_block
        gate = torch.full((gates,), 0.0 if deep else 1.0, device=device) if gamma is None else torch.sigmoid(gamma)
        if closed is None:
            closed = [deep and gamma is None] * gates
        return cls(
            prompt=prompt[None],
            gate=F.pad(gate, (first_block, 0))[None],
            tau=None if tau is None else tau[None],
            mean_pool=torch.tensor([pool == "mean"], device=device),
            plan=Plan((*[True] * first_block, *closed), pool),
            first_block=first_block,
        )

    @classmethod
    def of(cls, adapter: Adapter, spec: BackboneSpec, device: torch.device | str) -> "AdapterBatch":
        """A stored adapter's tensors on ``device``, ``A = 1``; it must agree with ``spec``."""
        tensors = (adapter.prompt, adapter.gamma, adapter.tau)
        prompt, gamma, tau = (None if tensor is None else tensor.to(device) for tensor in tensors)
        return cls.single(
            depth=spec.depth,
            width=spec.width,
            pool=adapter.pool,
            prompt=prompt,
            gamma=gamma,
            tau=tau,
            closed=None if adapter.gamma is None else (torch.sigmoid(adapter.gamma) == 0).tolist(),
            first_block=adapter.first_block,
            device=device,
        )

    @classmethod
    def stack(cls, rows: Sequence["AdapterBatch"]) -> "AdapterBatch":
        """Join single-adapter batches along ``A``, padding prompts to the longest and layers to the deepest.

        Prompts must enter the same block. Their memories are not kept.
        """
        assert len({row.first_block for row in rows}) == 1
        layers = max(row.prompt.shape[1] for row in rows)
        length = max(row.prompt.shape[2] for row in rows)
        device = rows[0].prompt.device
        is_deep = [row.prompt.shape[1] > 1 for row in rows]
        counts = [row.prompt.shape[2] for row in rows]
        depth = rows[0].gate.shape[1] + 1
        taus = [row.tau for row in rows]
        ones = torch.ones(1, depth, device=device)
        return cls(
            prompt=torch.cat([_pad_prompt(row.prompt, layers, length) for row in rows]),
            gate=torch.cat([row.gate for row in rows]),
            tau=None if all(tau is None for tau in taus) else torch.cat([ones if tau is None else tau for tau in taus]),
            mean_pool=torch.cat([row.mean_pool for row in rows]),
            plan=Plan.shared([row.plan for row in rows]),
            deep=torch.tensor(is_deep, device=device) if len(set(is_deep)) > 1 else None,
            counts=torch.tensor(counts, device=device) if len(set(counts)) > 1 else None,
            first_block=rows[0].first_block,
        )

    def gather(self, index: Tensor) -> "AdapterBatch":
        """Rows ``index`` (B,) of this batch, so that ``A`` becomes ``B``."""
        return AdapterBatch(
            prompt=self.prompt[index],
            gate=self.gate[index],
            tau=None if self.tau is None else self.tau[index],
            mean_pool=self.mean_pool[index],
            plan=self.plan,
            deep=None if self.deep is None else self.deep[index],
            counts=None if self.counts is None else self.counts[index],
            memory=tuple((keys[index], values[index]) for keys, values in self.memory),
            skipped=self.skipped,
            first_block=self.first_block,
        )

    @property
    def prompts(self) -> int:
        """``P``, padding included."""
        return self.prompt.shape[2]

    def entering(self, index: int) -> Tensor:
        """(A, P, D): the tokens with which the prompts start, should block ``index`` be the first to carry them."""
        return self.prompt[:, index - self.first_block - self.skipped if self.prompt.shape[1] > 1 else 0]

    def valid(self, body: int) -> Tensor | None:
        """(A, S) bool: which of ``body`` prefix and patch rows plus ``P`` prompt rows are real; None when all are."""
        if self.counts is None:
            return None
        position = torch.arange(self.prompts, device=self.prompt.device)
        prompts = position < self.counts[:, None]
        return torch.cat([prompts.new_ones(prompts.shape[0], body), prompts], dim=1)


def _pad_prompt(prompt: Tensor, layers: int, length: int) -> Tensor:
    """(1, 1|L, P, D) -> (1, layers, length, D): zeros fill rows; a shallow adapter never reads layers past 0."""
    padding = (0, 0, 0, length - prompt.shape[2], 0, layers - prompt.shape[1])
    return F.pad(prompt, padding)
