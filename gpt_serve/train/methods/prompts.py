"""The published methods as settings of the same tensors, and the trainable module that they share."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.adapters.adapter import Adapter, closed_gates
from gpt_serve.adapters.unknown import Unknown
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import TAU_MAX, TAU_MIN, Trunk, embed, prompted_features
from gpt_serve.specs import BackboneSpec, Pool, Tap
from gpt_serve.train.methods.gates import gumbel_temperature, harden, sample_gates
from gpt_serve.train.methods.heads import HeadInit, HeadNorm, Norm, make_head
from gpt_serve.train.methods.modules import TaskModule

GateKind = Literal["soft", "hard"]
PromptInit = Literal["random", "tokens", "kmeans", "mean", "max"]


@dataclass(frozen=True)
class Method:
    """Which tensors a method learns besides the head.

    Attributes:
        prompts: learns prompt tokens.
        deep: fresh tokens for every block instead of one set that is carried on.
        gated: learns gate priors.
        tempered: learns attention temperatures, unless a recipe says otherwise.
        shifted: learns three vectors that each block adds: all that learned biases can do.
        prompt_init: how its prompts start, unless a recipe says otherwise.
        full: trains the backbone itself, see `FullModule`; no adapter comes out.
    """

    prompts: bool = True
    deep: bool = False
    gated: bool = False
    tempered: bool = False
    shifted: bool = False
    prompt_init: PromptInit = "random"
    full: bool = False

    @property
    def learns(self) -> bool:
        """Whether anything is learned besides the head."""
        return self.prompts or self.tempered or self.shifted or self.full


_PROMPTED = {
    "gated": Method(gated=True, tempered=True),
    "gated-deep": Method(deep=True, gated=True, tempered=True),
    "vpt-shallow": Method(),
    "vpt-deep": Method(deep=True),
    "spt-shallow": Method(prompt_init="tokens"),
    "spt-deep": Method(deep=True, prompt_init="tokens"),
}
METHODS = {
    **_PROMPTED,
    **{f"{name}+shift": dataclasses.replace(method, shifted=True) for name, method in _PROMPTED.items()},
    "linear": Method(prompts=False),
    "bias": Method(prompts=False, shifted=True),
    "full": Method(prompts=False, full=True),
}


def find_method(name: str) -> Method:
    """The method of that name; `UsageError` lists the known ones."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


class AdapterModule(TaskModule):
    """The trainable tensors of one adapter.

    Gates that are exactly 0 are no parameters: no optimizer moves them, and their blocks compute no prompt rows.

    Args:
        spec: the backbone's.
        head: (C, K*D) and (C,).
        prompt: (1 or L - first_block, P, D); None without prompts.
        gamma: (L - 1 - first_block,) gate priors; None when gates are not learned. Infinite ones stay as they are.
        tau: (L,); None when temperatures are not learned.
        shift: (L, 3, D); None when shifts are not learned.
        first_block: the block that prompts enter.
        taps: what the head reads; none for the last block with ``pool``.
        pool: of the last block; None for what the backbone's pretraining calls for.
        head_norm: between the backbone's norm and the head; None for the pretrained norm alone.
        prompt_dropout: share of the prompts' values that is dropped in training mode.
        hard: gates are sampled, 0 or 1 for each image, in training mode, and 0 or 1 by their prior otherwise.

    Attributes:
        gamma: the gate priors that are learned, all of them or fewer; `priors` has all.
        closed: for each of `priors`, whether it is exactly 0 and stays so; None when gates are not learned.
        unknown: what tells strangers, once that is known; it belongs to the tensors as they are.
        threshold: (C,) probabilities from which on labels are given, once known, in a task with several an image.
    """

    _tau_before: Tensor | None
    _shift_before: Tensor | None
    _fixed: Tensor
    _learned: Tensor

    def __init__(
        self,
        spec: BackboneSpec,
        head: nn.Linear,
        *,
        prompt: Tensor | None = None,
        gamma: Tensor | None = None,
        tau: Tensor | None = None,
        shift: Tensor | None = None,
        first_block: int = 0,
        taps: tuple[Tap, ...] = (),
        pool: Pool | None = None,
        head_norm: HeadNorm | None = None,
        prompt_dropout: float = 0.0,
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.first_block = first_block
        self.taps = taps
        self.pool = pool or spec.pool
        self.head_norm = head_norm
        self.prompt_dropout = prompt_dropout
        self.hard = hard
        self.gumbel_temperature = gumbel_temperature(0.0)
        self.head = head
        self.unknown: Unknown | None = None
        self.threshold: Tensor | None = None
        self.prompt = None if prompt is None else nn.Parameter(prompt)
        self.tau = None if tau is None else nn.Parameter(tau)
        self.shift = None if shift is None else nn.Parameter(shift)
        for name, learned in (("tau", tau), ("shift", shift)):
            before = None if learned is None else learned[:first_block].clone()
            self.register_buffer(f"_{name}_before", before, persistent=False)
        self.gamma: nn.Parameter | None = None
        self.closed: tuple[bool, ...] | None = None
        if gamma is not None:
            closed = closed_gates(gamma)
            learned = gamma.isfinite() & ~closed
            self.closed = tuple(closed.tolist())
            self.gamma = nn.Parameter(gamma[learned])
            self.register_buffer("_fixed", gamma.masked_fill(closed, -torch.inf), persistent=False)
            self.register_buffer("_learned", learned.nonzero()[:, 0], persistent=False)

    @classmethod
    def initial(
        cls,
        backbone: Backbone,
        method: str,
        classes: int,
        *,
        prompts: int,
        gate_init: float,
        prompt_dropout: float,
        head_init: HeadInit,
        hard: bool = False,
        tempered: bool | None = None,
        first_block: int = 0,
        norm: Norm = "pretrained",
        taps: tuple[Tap, ...] = (),
    ) -> "AdapterModule":
        """Untrained tensors, as in the authors' code.

        Prompts are uniform in +-sqrt(6 / (3 * patch^2 + D)), gamma is ``-gate_init``, tau is 1, shifts are 0. The head
        is as in the authors' code (``kaiming``), or, with std 0.02 (``small``) or 0.01 (``tiny``), as Self-Prompt
        Tuning has it for MAE and MoCo v3; see `make_head`.

        Args:
            tempered: whether temperatures are learned; None for the method's own choice.
            first_block: the block that prompts enter.
            taps: what the head reads; none for the last block with the backbone's pooling.
            norm: the backbone's own before the head, or that and a `HeadNorm`, which learns what is standard later.

        Raises:
            UsageError: there is no such block.
        """
        kind = find_method(method)
        spec = backbone.spec
        if first_block >= spec.depth:
            raise UsageError(f"--first-block {first_block}: the backbone's last block is {spec.depth - 1}")
        blocks = spec.depth - first_block
        read = spec.width * max(1, len(taps))
        head_norm = None if norm == "pretrained" else HeadNorm(read)
        if head_norm is not None and norm == "fresh":
            head_norm.set_fresh(backbone.model)
        prompt = None
        if kind.prompts:
            height, width = backbone.model.patch_embed.patch_size
            bound = math.sqrt(6.0 / (3 * height * width + spec.width))
            prompt = torch.empty(blocks if kind.deep else 1, prompts, spec.width).uniform_(-bound, bound)
        return cls(
            spec,
            make_head(read, classes, head_init),
            prompt=prompt,
            gamma=torch.full((blocks - 1,), -float(gate_init)) if kind.gated else None,
            shift=torch.zeros(spec.depth, 3, spec.width) if kind.shifted else None,
            first_block=first_block,
            taps=taps,
            head_norm=head_norm,
            tau=torch.ones(spec.depth) if (kind.tempered if tempered is None else tempered) else None,
            prompt_dropout=prompt_dropout,
            hard=hard,
        )

    @classmethod
    def of(cls, adapter: Adapter, spec: BackboneSpec, prompt_dropout: float) -> "AdapterModule":
        """A copy of a stored adapter's tensors; it must agree with ``spec``."""
        head = nn.Linear(adapter.head_weight.shape[1], len(adapter.labels))
        with torch.no_grad():
            head.weight.copy_(adapter.head_weight)
            head.bias.copy_(adapter.head_bias)
        tensors = (adapter.prompt, adapter.gamma, adapter.tau, adapter.shift)
        prompt, gamma, tau, shift = (None if tensor is None else tensor.clone() for tensor in tensors)
        return cls(
            spec,
            head,
            prompt=prompt,
            gamma=gamma,
            tau=tau,
            shift=shift,
            first_block=adapter.first_block,
            taps=adapter.taps,
            pool=adapter.pool,
            prompt_dropout=prompt_dropout,
        )

    def anneal(self, progress: float) -> None:
        """Set the temperature of sampled gates; ``progress`` is the share of the epochs that are done, in [0, 1]."""
        self.gumbel_temperature = gumbel_temperature(progress)

    def priors(self) -> Tensor | None:
        """Gamma of every gate, -inf where it is closed; None when gates are not learned."""
        if self.gamma is None or len(self.gamma) == len(self._fixed):
            return self.gamma
        return self._fixed.index_put((self._learned,), self.gamma)

    def final_priors(self) -> Tensor | None:
        """`priors` as they are stored and served: +-inf for hard gates."""
        gamma = self.priors()
        return harden(gamma) if self.hard and gamma is not None else gamma

    def batch(self, rows: int) -> AdapterBatch:
        """The tensors for the forward pass; in training mode dropout and hard gates are drawn for each of ``rows``."""
        sampled = self.hard and self.training
        gamma, closed = self.priors() if sampled else self.final_priors(), self.closed
        if self.hard and not sampled and gamma is not None:
            closed = tuple(gamma.isneginf().tolist())
        adapter = AdapterBatch.single(
            depth=self.spec.depth,
            width=self.spec.width,
            pool=self.pool,
            prompt=self.prompt,
            gamma=gamma,
            tau=_joined(self._tau_before, self.tau),
            shift=_joined(self._shift_before, self.shift),
            closed=closed,
            first_block=self.first_block,
            taps=self.taps,
            device=self.head.weight.device,
        )
        if sampled and gamma is not None:
            gate = F.pad(sample_gates(gamma, rows, self.gumbel_temperature), (self.first_block, 0))
            adapter = dataclasses.replace(adapter, gate=gate)
        if self.training and self.prompt is not None and self.prompt_dropout > 0:
            prompt = adapter.prompt.expand(rows, -1, -1, -1)
            adapter = dataclasses.replace(adapter, prompt=F.dropout(prompt, self.prompt_dropout))
        return adapter

    @property
    def trunk(self) -> int:
        """How many of the first blocks training leaves as they are."""
        learned = (self.prompt, self.tau, self.shift)
        return self.first_block if any(tensor is not None for tensor in learned) else self.spec.depth

    def features(self, model: nn.Module, images: Tensor | Trunk) -> Tensor:
        """Normalised images (B, 3, H, W), or their `Trunk`, to what the backbone's norm puts out, (B, K*D)."""
        if isinstance(images, Trunk):
            return prompted_features(model, images, self.batch(len(images.tokens)))
        with torch.no_grad():
            tokens = embed(model, images)
        return prompted_features(model, tokens, self.batch(len(tokens)))

    def stored(self) -> dict[str, Any]:
        """The tensors as fields of an `Adapter`: float32 copies on the CPU."""
        head = (self.head.weight, self.head.bias) if self.head_norm is None else self.head_norm.folded(self.head)
        tensors = {"prompt": self.prompt, "gamma": self.final_priors()}
        tensors |= {"tau": _joined(self._tau_before, self.tau), "shift": _joined(self._shift_before, self.shift)}
        tensors |= {"head_weight": head[0], "head_bias": head[1]}
        stored = {name: tensor.detach().float().cpu() for name, tensor in tensors.items() if tensor is not None}
        rest = {"first_block": self.first_block, "taps": self.taps, "pool": self.pool, "unknown": self.unknown}
        rest["threshold"] = self.threshold
        return {name: tensor.clone() for name, tensor in stored.items()} | rest

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperatures in range after an optimizer step, as the authors do on every forward."""
        if self.tau is not None:
            self.tau.clamp_(TAU_MIN, TAU_MAX)


def _joined(before: Tensor | None, learned: Tensor | None) -> Tensor | None:
    """``learned`` (L, ...) from the first block on; ``before``, what they began as, in the blocks that tasks share."""
    if before is None or learned is None or not len(before):
        return learned
    return torch.cat([before, learned[len(before) :]])
