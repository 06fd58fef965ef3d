"""Heads: from the features of the taps to what a task answers.

Each is a function of features and tensors. All end in a linear classifier, ``head.weight`` and ``head.bias``:

    linear      one answer an image: logits (B, C) of pooled features
    per patch   the same classifier on every patch token: logits (B, C, gh, gw), so that BatchNorm before it folds away
    SETR-PUP    a decoder before the classifier (Zheng et al. 2021, Sec. 3.2, progressive upsampling): logits
                (B, C, 8*gh, 8*gw); the last of its four upsamplings is the mask's own, see `gpt_serve.images.masks`

Shapes: batch ``B``, classes ``C``, taps ``K``, width ``D``, patches ``N = gh * gw``, channels of the decoder ``M``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.parse import DECODER
from gpt_serve.specs import Tap

NORM_EPS = 1e-6  # of the decoder's LayerNorm, as SETR's authors have it
STAGES = 4  # convolutions of the decoder; each but the last doubles the sides
UPSCALE = 2 ** (STAGES - 1)
"""Cells of the decoder's logits for each patch, along each side."""


@dataclass(frozen=True)
class HeadForm:
    """What is known of a head on the host, beside its tensors.

    Attributes:
        masks: whether it answers for each patch.
        shapes: of its tensors by name, in the order in which they are packed: the classifier first.
    """

    masks: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, adapter: Adapter) -> "HeadForm":
        """The form of a stored adapter's head."""
        shapes = ((name, tuple(tensor.shape)) for name, tensor in head_tensors(adapter).items())
        return cls(adapter.kind == "segmentation", tuple(shapes))

    @property
    def classes(self) -> int:
        """``C``."""
        return self.shapes[0][1][0]

    @property
    def decodes(self) -> bool:
        """Whether a decoder stands before the classifier."""
        return any(name in DECODER for name, _ in self.shapes)

    def operations(self, patches: int) -> float:
        """Multiplications and additions for an image of so many patches, where they are worth counting."""
        cells, total = 1, 0.0
        for name, shape in self.shapes[2:]:
            if len(shape) == 4:
                out, channels, height, width = shape
                total += 2.0 * patches * cells * out * channels * height * width
                cells *= 1 if name == f"head.conv{STAGES}.weight" else 4
        return total


def head_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter's head by their names in its file, with those that `stranger_distance` takes."""
    unknown = {} if adapter.unknown is None else adapter.unknown.measures()
    return {"head.weight": adapter.head_weight, "head.bias": adapter.head_bias, **adapter.decoder, **unknown}


def linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (B, C) of a linear classifier.

    Args:
        features: (B, K*D), the taps side by side.
        weight: (C, K*D).
        bias: (C,).
    """
    return F.linear(features, weight, bias)


def probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """(B, C) to (B, C): of classes, which add up to 1, or of labels, each by itself."""
    return torch.sigmoid(logits) if multi_label else logits.softmax(dim=-1)


def linear_each(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (G, M, C) of ``G`` linear classifiers of one shape, of ``M`` rows each, in one product.

    ``logits[g, m] = weight[g] @ features[g, m] + bias[g]``

    Args:
        features: (G, M, K*D), the taps side by side.
        weight: (G, C, K*D).
        bias: (G, C).
    """
    return torch.baddbmm(bias[:, None], features, weight.mT)


def stranger_distance(features: Tensor, mean: Tensor, scale: Tensor, basis: Tensor) -> Tensor:
    """How far features lie from what a task was trained on, (B,), see `gpt_serve.adapters.unknown`.

    ::

        |scale (x - mean)|^2 - |basis (x - mean)|^2

    Args:
        features: (B, K*D), the taps side by side.
        mean: (K*D,).
        scale: (K*D,).
        basis: (R, K*D).
    """
    # With a bias, as a head has it: quantized graphs leave such products as they are.
    inside = F.linear(features, basis, -(basis @ mean))
    return (scale * (features - mean)).square().sum(dim=1) - inside.square().sum(dim=1)


def per_patch(tokens: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """Logits (B, C, gh, gw) of a linear classifier on each patch.

    Args:
        tokens: (B, N, K*D), the taps side by side.
        weight: (C, K*D).
        bias: (C,).
        grid: (gh, gw), whose product is ``N``.
    """
    return _on_grid(linear(tokens, weight, bias), grid)


def _on_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) to (B, D, gh, gw)."""
    return tokens.mT.reshape(tokens.shape[0], tokens.shape[2], *grid)


def setr_pup(tokens: Tensor, tensors: Mapping[str, Tensor], grid: tuple[int, int]) -> Tensor:
    """Logits (B, C, 8*gh, 8*gw) of a SETR-PUP decoder whose BatchNorm is folded into its convolutions.

    LayerNorm, then four times a 3x3 convolution and ReLU, of which the first three are followed by bilinear upsampling
    by 2 (align_corners off), then the classifier at half the input's resolution (of patches of 16 pixels).

    Args:
        tokens: (B, N, D), what a block hands on, without the backbone's last norm.
        tensors: by their names in the adapter's file, see `parse.DECODER`.
        grid: (gh, gw), whose product is ``N``.
    """
    norm = tensors["head.norm.weight"], tensors["head.norm.bias"]
    x = _on_grid(F.layer_norm(tokens, tokens.shape[-1:], *norm, eps=NORM_EPS), grid)
    for stage in range(1, STAGES + 1):
        x = F.conv2d(x, tensors[f"head.conv{stage}.weight"], tensors[f"head.conv{stage}.bias"], padding=1).relu()
        if stage < STAGES:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return F.conv2d(x, tensors["head.weight"][..., None, None], tensors["head.bias"])


def mask_logits(features: Tensor, tensors: Mapping[str, Tensor], grid: tuple[int, int]) -> Tensor:
    """Logits (B, C, h, w) of a segmentation head, whichever it is, in float32.

    Args:
        features: (B, N, K*D), what its taps read.
        tensors: from `head_tensors`, of any floating type.
        grid: (gh, gw) patches.
    """
    own = {name: tensor.float() for name, tensor in tensors.items()}
    if DECODER.keys() <= own.keys():
        return setr_pup(features.float(), own, grid)
    return per_patch(features.float(), own["head.weight"], own["head.bias"], grid)


def read_taps(tapped: Sequence[Tensor], taps: Sequence[Tap], wanted: Sequence[Tap], rows: Tensor | slice) -> Tensor:
    """The features that the head of some rows reads, of those that a pass made: (R, K*D), or (R, N, K*D) of patches.

    Args:
        tapped: for each of ``taps`` (B, D) or (B, N, D), from `prompted.tapped_features`.
        wanted: the head's taps, ``K`` of ``taps``.
        rows: which of the ``B`` rows, ``R`` of them.
    """
    return torch.cat([tapped[taps.index(tap)][rows] for tap in wanted], dim=-1)
