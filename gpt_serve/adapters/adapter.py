"""One adapter and its file."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gpt_serve.adapters.file import FORMAT, PLAIN, from_file, to_file
from gpt_serve.errors import BackboneMismatch, InvalidAdapter
from gpt_serve.specs import BackboneSpec, Pool, Preprocess


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything that a task adds to the backbone; tensors are float32 on the CPU.

    Attributes:
        prompt: (1 or L - first_block, P, D); None for no prompts.
        gamma: (L - 1 - first_block,) gate priors, +-inf for hard gates; None for gates 1 (shallow) or 0 (deep).
        tau: (L,) attention temperatures; None for 1.
        head_weight: (C, D).
        head_bias: (C,).
        labels: the ``C`` class names.
        training: hyperparameters, data and metrics, as JSON values.
        created: UTC, ISO 8601.
        first_block: the block that prompts enter, from 0; those before it compute images alone.
    """

    task: str
    method: str
    backbone: str
    backbone_sha256: str
    labels: tuple[str, ...]
    pool: Pool
    preprocess: Preprocess
    training: dict[str, Any]
    created: str
    head_weight: Tensor
    head_bias: Tensor
    prompt: Tensor | None = None
    gamma: Tensor | None = None
    tau: Tensor | None = None
    first_block: int = 0

    @property
    def prompts(self) -> int:
        """``P``; 0 without prompts."""
        return 0 if self.prompt is None else self.prompt.shape[1]

    @property
    def deep(self) -> bool:
        """Whether every block has tokens of its own."""
        return self.prompt is not None and self.prompt.shape[0] > 1

    def to_bytes(self) -> bytes:
        """The adapter file; equal adapters give equal bytes.

        Raises:
            InvalidAdapter: what `from_bytes` would refuse is never written.
        """
        tensors = {"head.weight": self.head_weight, "head.bias": self.head_bias}
        learned = {"prompt": self.prompt, "gamma": self.gamma, "tau": self.tau}
        tensors |= {name: tensor for name, tensor in learned.items() if tensor is not None}
        metadata = {"format": FORMAT} | {name: getattr(self, name) for name in PLAIN}
        if self.first_block:
            metadata["first_block"] = str(self.first_block)
        metadata |= {
            "labels": json.dumps(self.labels, ensure_ascii=False),
            "preprocess": json.dumps(self.preprocess.to_dict()),
            "training": json.dumps(self.training, ensure_ascii=False),
        }
        stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        data = to_file(stored, metadata)
        Adapter.from_bytes(data)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Adapter":
        """Parse and check an adapter file.

        Raises:
            InvalidAdapter: the first thing that is wrong with it.
        """
        fields, tensors = from_file(data)
        return cls(
            **fields,
            head_weight=tensors["head.weight"],
            head_bias=tensors["head.bias"],
            prompt=tensors.get("prompt"),
            gamma=tensors.get("gamma"),
            tau=tensors.get("tau"),
        )

    def check_backbone(self, spec: BackboneSpec) -> None:
        """Raise unless the adapter belongs to the backbone.

        Raises:
            BackboneMismatch: it was trained on other weights or at another input size; both are named.
            InvalidAdapter: its shapes are not the backbone's.
        """
        if not spec.fits(self.backbone_sha256, self.preprocess.input_size):
            told = spec.told_from(self.backbone, self.backbone_sha256, self.preprocess.input_size)
            raise BackboneMismatch(f"trained on backbone {told} or train again")
        if self.head_weight.shape[1] != spec.width:
            raise InvalidAdapter(f"width {self.head_weight.shape[1]} is not the backbone's {spec.width}")
        first = self.first_block
        if first >= spec.depth:
            raise InvalidAdapter(f"prompts enter block {first}, the backbone's last is {spec.depth - 1}")
        depths = {
            "prompt": self.prompt.shape[0] + first if self.prompt is not None and self.deep else None,
            "gamma": None if self.gamma is None else len(self.gamma) + 1 + first,
            "tau": None if self.tau is None else len(self.tau),
        }
        for name, depth in depths.items():
            if depth is not None and depth != spec.depth:
                raise InvalidAdapter(f"{name} is for {depth} blocks, the backbone has {spec.depth}")


def revision_of(data: bytes) -> str:
    """First 12 hex digits of the SHA-256 of an adapter file."""
    return hashlib.sha256(data).hexdigest()[:12]
