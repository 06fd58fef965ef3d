"""What training fits for masks: the adapter's tensors with a head for each patch, or with a SETR-PUP decoder.

The decoder has BatchNorm, and auxiliary heads, while it is trained: the first is folded into the convolutions, the
others are left out, when the adapter is published. Shapes: batch ``B``, patches ``N = gh * gw``, width ``D``, taps
``K``, classes ``C``, channels ``M``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.model.heads import NORM_EPS, STAGES, per_patch
from gpt_serve.model.prompted import Trunk
from gpt_serve.specs import BackboneSpec, Tap
from gpt_serve.train.masks.samples import NOTHING
from gpt_serve.train.methods.prompts import AdapterModule

AUXILIARY_WEIGHT = 0.4
CHANNELS = 256  # SETR's


class MaskModule(AdapterModule):
    """A linear classifier on each patch; its norm stands for the BatchNorm before it, see `HeadNorm`."""

    grid: tuple[int, int]

    def forward(self, model: nn.Module, images: Tensor | Trunk) -> Tensor:
        """The logits (B, C, y, x) of what `features` takes."""
        return self.answer(self.features(model, images))

    def answer(self, features: Tensor) -> Tensor:
        """The logits (B, C, y, x) of features (B, N, K*D)."""
        return per_patch(self.seen(features), self.head.weight, self.head.bias, self.grid)

    def loss(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy over the pixels (B, H, W) that have a class, and the logits of `answer`."""
        logits = self.answer(features).float()
        return pixel_loss(logits, ids), logits

    def stored(self) -> dict[str, Any]:
        """The tensors as fields of an `Adapter`: float32 copies on the CPU."""
        return super().stored() | {"kind": "segmentation"}


class SetrModule(MaskModule):
    """A SETR-PUP decoder with auxiliary heads; of the taps the first is the decoder's, the others are theirs.

    Attributes:
        decoder: from (B, N, D) to (B, M, 8*gh, 8*gw).
        auxiliary: a head for each of the other taps.
    """

    decoder: "Decoder"
    auxiliary: nn.ModuleList

    def add_decoder(self, spec: BackboneSpec, classes: int, grid: tuple[int, int]) -> None:
        """Make the untrained decoder and heads; the classifier that `AdapterModule` has is the decoder's."""
        channels = self.head.in_features
        self.decoder = Decoder(spec.width, channels, STAGES)
        self.auxiliary = nn.ModuleList(Auxiliary(spec.width, channels, classes, grid) for _ in self.taps[1:])

    def answer(self, features: Tensor) -> Tensor:
        """The logits (B, C, 8*gh, 8*gw) of features (B, N, K*D): of the first ``D`` of them."""
        tokens = features[..., : self.spec.width]
        maps = self.decoder(tokens, self.grid)
        return F.conv2d(maps, self.head.weight[..., None, None], self.head.bias)

    def loss(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `MaskModule.loss`; those of the auxiliary heads are added with weight 0.4."""
        total, logits = super().loss(features, ids)
        if self.training:
            parts = features.tensor_split(len(self.taps), dim=-1)[1:]
            for head, tokens in zip(self.auxiliary, parts, strict=True):
                total = total + AUXILIARY_WEIGHT * pixel_loss(head(tokens).float(), ids)
        return total, logits

    def stored(self) -> dict[str, Any]:
        """The tensors as fields of an `Adapter`, with BatchNorm folded and without auxiliary heads."""
        return super().stored() | {"decoder": self.decoder.folded(), "taps": self.taps[:1]}

    def steering(self) -> list[nn.Parameter]:
        """The parameters that are learned besides heads and decoder."""
        heads = {id(parameter) for parameter in self.head_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in heads]

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the classifier, the decoder and the auxiliary heads."""
        return [*self.head.parameters(), *self.decoder.parameters(), *self.auxiliary.parameters()]


class Decoder(nn.Module):
    """LayerNorm, then ``stages`` times convolution, BatchNorm and ReLU, with 2x upsampling between them."""

    def __init__(self, width: int, channels: int, stages: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        sizes = [width] + [channels] * (stages - 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(size, channels, 3, padding=1) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(stages))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) to (B, M, 8*gh, 8*gw)."""
        x: Tensor = self.norm(tokens).mT.reshape(len(tokens), -1, *grid)
        for stage, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x)).relu()
            if stage < len(self.convolutions) - 1:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return x

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The tensors of an adapter's decoder: a convolution ``w x + b`` behind which BatchNorm gives ``s (.) + t``.

        With running mean ``m``, variance ``v``, weight ``g`` and bias ``h`` that is ``s = g / sqrt(v + eps)`` and
        ``t = h - s m``: a convolution with weight ``s w`` and bias ``s b + t``.
        """
        tensors: dict[str, Tensor] = {"head.norm.weight": self.norm.weight, "head.norm.bias": self.norm.bias}
        layers: Any = zip(self.convolutions, self.norms, strict=True)
        for number, (convolution, norm) in enumerate(layers, start=1):
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shifted = convolution.bias.double() - norm.running_mean.double()
            tensors[f"head.conv{number}.weight"] = convolution.weight.double() * scale[:, None, None, None]
            tensors[f"head.conv{number}.bias"] = shifted * scale + norm.bias.double()
        return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}


class Auxiliary(nn.Module):
    """LayerNorm, one convolution with BatchNorm and ReLU, 4x upsampling, classifier; while training only."""

    def __init__(self, width: int, channels: int, classes: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.decoder = Decoder(width, channels, 1)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to logits (B, C, 4*gh, 4*gw)."""
        x = F.interpolate(self.decoder(tokens, self.grid), scale_factor=4, mode="bilinear", align_corners=False)
        logits: Tensor = self.classifier(x)
        return logits


def pixel_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C, y, x), scaled bilinearly, over the pixels (B, H, W) that have a class."""
    scaled = F.interpolate(logits, tuple(ids.shape[1:]), mode="bilinear", align_corners=False)
    total = F.cross_entropy(scaled, ids.long(), ignore_index=NOTHING, reduction="sum")
    return total / (ids != NOTHING).sum().clamp(min=1)


def spread_taps(depth: int) -> tuple[Tap, ...]:
    """Four blocks from the middle to the end, whose patches say more together than those of any one of them."""
    blocks = dict.fromkeys((depth // 2 - 1, 3 * depth // 4 - 1, depth - 2, depth - 1))
    return tuple(Tap(block, "grid") for block in blocks if block >= 0)


def setr_taps(depth: int) -> tuple[Tap, ...]:
    """The last block for the decoder, the 5th and 9th of 12 for the auxiliary heads (Yoo et al., Sec. 5.1)."""
    blocks = dict.fromkeys((depth - 1, 5 * depth // 12 - 1, 9 * depth // 12 - 1))
    return tuple(Tap(block, "raw") for block in blocks if block >= 0)
