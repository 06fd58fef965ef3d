"""The published methods as settings of the same tensors, and the trainable module that they share."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.adapter_batch import AdapterBatch
from gpt_serve.backbone import Backbone
from gpt_serve.errors import UsageError
from gpt_serve.prompted import TAU_MAX, TAU_MIN, prompted_features

HEAD_BIAS = -math.log(99.0)
SMALL_HEAD_STD = 0.02

HeadInit = Literal["kaiming", "small"]


@dataclass(frozen=True)
class Method:
    """Which tensors a method learns besides the head.

    Attributes:
        prompts: learns prompt tokens.
        deep: fresh tokens for every block instead of one set that is carried on.
        gated: learns gate priors.
        tempered: learns attention temperatures.
    """

    prompts: bool = True
    deep: bool = False
    gated: bool = False
    tempered: bool = False


METHODS = {
    "gated": Method(gated=True, tempered=True),
    "vpt-shallow": Method(),
    "vpt-deep": Method(deep=True),
    "linear": Method(prompts=False),
}


def find_method(name: str) -> Method:
    """The method of that name; `UsageError` lists the known ones."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


class AdapterModule(nn.Module):
    """The trainable tensors of one adapter, initialised as in the authors' code (METHODS in the docs).

    Attributes:
        prompt: (1 or L, P, D), uniform in +-sqrt(6 / (3 * patch^2 + D)); None without prompts.
        gamma: (L-1,), starts at ``-gate_init``; None when gates are not learned.
        tau: (L,), starts at 1; None when temperatures are not learned.
        head: (C, D) and (C,). ``kaiming``: Kaiming-normal (fan-out) and -ln 99 as in the authors' code;
            ``small``: truncated normal of std 0.02 and 0, as Self-Prompt Tuning does for MAE.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: str,
        classes: int,
        *,
        prompts: int,
        gate_init: float,
        prompt_dropout: float,
        head_init: HeadInit,
    ) -> None:
        super().__init__()
        kind = find_method(method)
        spec = backbone.spec
        self.spec = spec
        self.prompt_dropout = prompt_dropout
        self.prompt: nn.Parameter | None = None
        self.gamma: nn.Parameter | None = None
        self.tau: nn.Parameter | None = None
        if kind.prompts:
            height, width = backbone.model.patch_embed.patch_size
            bound = math.sqrt(6.0 / (3 * height * width + spec.width))
            shape = (spec.depth if kind.deep else 1, prompts, spec.width)
            self.prompt = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        if kind.gated:
            self.gamma = nn.Parameter(torch.full((spec.depth - 1,), -float(gate_init)))
        if kind.tempered:
            self.tau = nn.Parameter(torch.ones(spec.depth))
        self.head = nn.Linear(spec.width, classes)
        _init_head(self.head, head_init)

    def batch(self, rows: int) -> AdapterBatch:
        """The tensors for the forward pass; in training mode with dropout drawn for each of ``rows`` images."""
        adapter = AdapterBatch.single(
            depth=self.spec.depth,
            width=self.spec.width,
            pool=self.spec.pool,
            prompt=self.prompt,
            gamma=self.gamma,
            tau=self.tau,
            device=self.head.weight.device,
        )
        if self.training and self.prompt is not None and self.prompt_dropout > 0:
            prompt = adapter.prompt.expand(rows, -1, -1, -1)
            adapter = dataclasses.replace(adapter, prompt=F.dropout(prompt, self.prompt_dropout))
        return adapter

    def forward(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Embedded images (B, prefix + N, D) to logits (B, C)."""
        logits: Tensor = self.head(prompted_features(model, tokens, self.batch(len(tokens))))
        return logits

    def learned(self) -> dict[str, Tensor]:
        """Those of ``prompt``, ``gamma`` and ``tau`` that the method learns."""
        tensors = {"prompt": self.prompt, "gamma": self.gamma, "tau": self.tau}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperatures in range after an optimizer step, as the authors do on every forward."""
        if self.tau is not None:
            self.tau.clamp_(TAU_MIN, TAU_MAX)


def _init_head(head: nn.Linear, kind: HeadInit) -> None:
    if kind == "kaiming":
        nn.init.kaiming_normal_(head.weight, a=0, mode="fan_out")
        nn.init.constant_(head.bias, HEAD_BIAS)
    else:
        nn.init.trunc_normal_(head.weight, std=SMALL_HEAD_STD)
        nn.init.zeros_(head.bias)
