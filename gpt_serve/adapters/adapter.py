"""One adapter and its file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.adapters.file import FORMAT, PLAIN, from_file, to_file
from gpt_serve.adapters.parse import DECODER
from gpt_serve.adapters.unknown import Unknown
from gpt_serve.errors import BackboneMismatch, InvalidAdapter
from gpt_serve.specs import BackboneSpec, Kind, Pool, Preprocess, Tap


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything that a task adds to the backbone; tensors are float32 on the CPU.

    Attributes:
        prompt: (1 or L - first_block, P, D); None for no prompts.
        gamma: (L - 1 - first_block,) gate priors, +-inf for hard gates; None for gates 1 (shallow) or 0 (deep).
        tau: (L,) attention temperatures; None for 1.
        shift: (L, 3, D), what is added after attention, before and after the MLP of each block; None for 0.
        head_weight: (C, K*D) for the ``K`` taps, in their order; (C, M) for the ``M`` channels of a decoder.
        head_bias: (C,).
        labels: the ``C`` class names; the index of a class is its id in a mask.
        pool: what the last block's tokens become where there are no taps.
        training: hyperparameters, data and metrics, as JSON values.
        created: UTC, ISO 8601.
        first_block: the block that prompts enter, from 0; those before it compute images alone.
        taps: what the head reads; none stands for the last block with ``pool``, see `taps_of`. Those of a segmentation
            task are of every patch.
        kind: ``classification``: one answer an image; ``segmentation``: one a pixel.
        ignore: which values of a segmentation task's label files belong to no class.
        decoder: what stands between the tap and the head of a segmentation task, by `parse.DECODER`'s names; see
            `gpt_serve.model.heads`. Empty for none.
        unknown: what tells images of the task from strangers; None where the adapter cannot.
        threshold: (C,) probabilities from which on a label is given, in a task with several labels an image; None for
            one class an image.
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
    shift: Tensor | None = None
    first_block: int = 0
    taps: tuple[Tap, ...] = ()
    kind: Kind = "classification"
    ignore: tuple[int, ...] = ()
    decoder: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: Unknown | None = None
    threshold: Tensor | None = None

    @property
    def width(self) -> int:
        """``D``."""
        if self.decoder:
            return self.decoder["head.norm.weight"].shape[0]
        return self.head_weight.shape[1] // max(1, len(self.taps))

    @property
    def prompts(self) -> int:
        """``P``; 0 without prompts."""
        return 0 if self.prompt is None else self.prompt.shape[1]

    @property
    def deep(self) -> bool:
        """Whether every block has tokens of its own."""
        return self.prompt is not None and self.prompt.shape[0] > 1

    def gates(self, depth: int) -> Tensor:
        """The gates of blocks 0..L-2 of a backbone with ``depth`` blocks, (L-1,), see `gate_values`."""
        return gate_values(self.gamma, depth=depth, prompts=self.prompts, deep=self.deep, first_block=self.first_block)

    def taps_of(self, depth: int) -> tuple[Tap, ...]:
        """What the head reads on a backbone with ``depth`` blocks, at least one."""
        return taps_of(self.taps, self.pool, depth=depth, prompts=self.prompts)

    def to_bytes(self) -> bytes:
        """The adapter file; equal adapters give equal bytes.

        Raises:
            InvalidAdapter: what `from_bytes` would refuse is never written.
        """
        tensors = {"head.weight": self.head_weight, "head.bias": self.head_bias, **self.decoder}
        learned = {"prompt": self.prompt, "gamma": self.gamma, "tau": self.tau, "shift": self.shift}
        learned["threshold"] = self.threshold
        tensors |= {name: tensor for name, tensor in learned.items() if tensor is not None}
        tensors |= {} if self.unknown is None else self.unknown.tensors()
        metadata = {"format": FORMAT} | {name: getattr(self, name) for name in PLAIN}
        if self.first_block:
            metadata["first_block"] = str(self.first_block)
        if self.taps:
            metadata["taps"] = json.dumps([[tap.block, tap.pool] for tap in self.taps])
        if self.threshold is not None:
            metadata["multi_label"] = "true"
        if self.kind != "classification":
            metadata |= {"kind": self.kind, "ignore": json.dumps(self.ignore)}
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
            shift=tensors.get("shift"),
            decoder={name: tensors[name] for name in DECODER if name in tensors},
            unknown=Unknown.of(tensors),
            threshold=tensors.get("threshold"),
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
        if self.width != spec.width:
            raise InvalidAdapter(f"width {self.width} is not the backbone's {spec.width}")
        self._check_taps(spec)
        first = self.first_block
        if first >= spec.depth:
            raise InvalidAdapter(f"prompts enter block {first}, the backbone's last is {spec.depth - 1}")
        depths = {
            "prompt": self.prompt.shape[0] + first if self.prompt is not None and self.deep else None,
            "gamma": None if self.gamma is None else len(self.gamma) + 1 + first,
            "tau": None if self.tau is None else len(self.tau),
            "shift": None if self.shift is None else len(self.shift),
        }
        for name, depth in depths.items():
            if depth is not None and depth != spec.depth:
                raise InvalidAdapter(f"{name} is for {depth} blocks, the backbone has {spec.depth}")

    def _check_taps(self, spec: BackboneSpec) -> None:
        depth, absent = spec.depth, set(get_args(Pool)) - set(spec.pools)
        for tap in self.taps or [Tap(depth - 1, self.pool)]:
            if tap.block >= depth:
                raise InvalidAdapter(f"the head reads block {tap.block}, the backbone's last is {depth - 1}")
            if tap.pool in absent:
                raise InvalidAdapter(f"the head reads the pooling {tap.pool!r}, which the backbone does not have")
            if tap.pool == "mean" and tap.block != depth - 1:
                raise InvalidAdapter(f"the head reads prompts after block {tap.block}, which is not the last")


def gate_values(
    gamma: Tensor | None,
    *,
    depth: int,
    prompts: int,
    deep: bool,
    first_block: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """``sigmoid(gamma)`` (Eq. 6), or without ``gamma`` 1 for shallow prompts and 0 for deep ones.

    A gate is closed if it is exactly 0. So are those before ``first_block``, where no prompts are, and all where there
    are no prompts: nothing is written there.

    Args:
        gamma: (L - 1 - first_block,).

    Returns:
        (L-1,), the gates of blocks 0..L-2; the last block has none.
    """
    if not prompts:
        return torch.zeros(depth - 1, device=device)
    if gamma is None:
        gate = torch.full((depth - 1 - first_block,), 0.0 if deep else 1.0, device=device)
    else:
        gate = torch.sigmoid(gamma)
    return F.pad(gate, (first_block, 0))


def closed_gates(gamma: Tensor) -> Tensor:
    """Whether each gate of the priors ``gamma`` (L - 1 - first_block,) is exactly 0, and so never written through."""
    return torch.sigmoid(gamma) == 0


def taps_of(taps: Sequence[Tap], pool: Pool, *, depth: int, prompts: int) -> tuple[Tap, ...]:
    """``taps``, or the last block with ``pool``; without prompts a mean over them and the patches is one of patches."""
    chosen = tuple(taps) or (Tap(depth - 1, pool),)
    return chosen if prompts else tuple(Tap(tap.block, "patches") if tap.pool == "mean" else tap for tap in chosen)


def revision_of(data: bytes) -> str:
    """First 12 hex digits of the SHA-256 of an adapter file."""
    return hashlib.sha256(data).hexdigest()[:12]
