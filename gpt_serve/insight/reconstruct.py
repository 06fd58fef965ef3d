"""What a block still knows of an image: Deep Image Prior on its tokens (Figs. 2 and 9 to 11 of the paper).

An untrained convolutional network maps fixed noise to an image and is fitted until that image's tokens are close to
those of the original; its structure is the only prior (Ulyanov et al., Deep Image Prior, CVPR 2018). The network is
their hourglass with thin skip connections, which no maintained library has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.errors import UsageError
from gpt_serve.insight.attention import embed_pixels
from gpt_serve.insight.figures import save_figure
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import block, prompted_features
from gpt_serve.specs import Preprocess

NOISE_CHANNELS = 32
WIDTH = 32
SKIP = 4
LEARNING_RATE = 0.01
MIN_SIDE = 16  # SSIM's window of 11 pixels needs an image around it


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """An image from the tokens of one block.

    Attributes:
        block: counted from 1.
        image: (3, H, W) in [0, 1], on the CPU.
        error: mean squared difference between its tokens and those of the original.
        psnr: in dB, of values in [0, 1].
        ssim: structural similarity, at most 1.
    """

    block: int
    image: Tensor
    error: float
    psnr: float
    ssim: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers."""
        return {"block": self.block, "error": self.error, "psnr": self.psnr, "ssim": self.ssim}


def require_metrics() -> None:
    """Raise `UsageError` unless torchmetrics is installed."""
    if find_spec("torchmetrics") is None:
        raise UsageError("reconstruct needs torchmetrics: pip install 'gpt-serve[insight]'")


def quality(image: Tensor, original: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of two images (3, H, W) in [0, 1], as torchmetrics has them."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = peak_signal_noise_ratio(image[None], original[None], data_range=1.0)
    ssim = structural_similarity_index_measure(image[None], original[None], data_range=1.0)
    return float(psnr), float(ssim)  # type: ignore[arg-type]


def tokens_after(model: Any, tokens: Tensor, adapter: AdapterBatch, number: int) -> Tensor:
    """The prefix and patch tokens that block ``number``, counted from 1, hands on: (B, prefix + N, D)."""
    ran: list[Tensor] = []

    def run(blk: Any, x: Tensor, tau: Tensor | None, mask: Tensor | None, *_: Any) -> Tensor:
        if len(ran) == number:  # later blocks have no part in it
            return x
        ran.append(block(blk, x, tau, mask))
        return ran[-1]

    prompted_features(model, tokens, adapter, run_block=run)
    return ran[-1][:, : tokens.shape[1]]


def reconstruct(
    backbone: Backbone,
    image: Tensor,
    preprocess: Preprocess,
    adapter: AdapterBatch,
    number: int,
    *,
    steps: int,
    seed: int,
    on_step: Callable[[], object],
) -> Reconstruction:
    """The image whose tokens after block ``number`` are closest to those of ``image``, of all that the fit passes.

    Args:
        image: (3, H, W) in [0, 1].
        preprocess: gives the normalisation.
        adapter: one adapter, ``A = 1``.
        on_step: called after each of the ``steps``.

    Raises:
        UsageError: the input is too small.
    """
    side = min(image.shape[1:])
    if side < MIN_SIDE:
        raise UsageError(f"an input of {side} pixels is too small: use --input-size {MIN_SIDE} or more")
    original = image.to(backbone.device)

    def represent(images: Tensor) -> Tensor:
        return tokens_after(backbone.model, embed_pixels(backbone, 255 * images, preprocess), adapter, number)

    with torch.no_grad():
        target = represent(original[None])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = hourglass(side).to(backbone.device)
        noise = (0.1 * torch.rand(1, NOISE_CHANNELS, *original.shape[1:])).to(backbone.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    best, closest = torch.zeros_like(original), math.inf
    for _ in range(steps):
        output = network(noise)
        error = F.mse_loss(represent(output), target)
        if error.item() < closest:
            best, closest = output.detach()[0], error.item()
        optimizer.zero_grad(set_to_none=True)
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step()
    return Reconstruction(number, best.cpu(), closest, *quality(best, original))


def hourglass(side: int) -> nn.Module:
    """Noise (1, `NOISE_CHANNELS`, H, W) to an image (1, 3, H, W) in (0, 1).

    Args:
        side: the shorter of H and W; it is halved up to five times, down to 4 or more.
    """
    scales = max(1, min(5, int(math.log2(side)) - 2))
    inner: nn.Module = nn.Identity()
    for depth in reversed(range(scales)):
        inner = Scale(WIDTH if depth else NOISE_CHANNELS, inner)
    return nn.Sequential(inner, nn.Conv2d(WIDTH, 3, 1), nn.Sigmoid())


class Scale(nn.Module):
    """Halves, works on, and doubles (1, C, H, W) to (1, `WIDTH`, H, W), with a thin connection past it."""

    def __init__(self, channels: int, inner: nn.Module) -> None:
        super().__init__()
        self.below = nn.Sequential(_unit(channels, WIDTH, 3, stride=2), _unit(WIDTH, WIDTH, 3), inner)
        self.past = _unit(channels, SKIP, 1)
        self.norm = nn.BatchNorm2d(WIDTH + SKIP)
        self.join = nn.Sequential(_unit(WIDTH + SKIP, WIDTH, 3), _unit(WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        grown = F.interpolate(self.below(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        joined: Tensor = self.join(self.norm(torch.cat([grown, self.past(x)], dim=1)))
        return joined


def _unit(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(channels, width, kernel, stride, kernel // 2, padding_mode="reflect")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.LeakyReLU(0.2))


def plot_reconstructions(original: Tensor, rows: Mapping[str, Sequence[Reconstruction]], path: Path) -> None:
    """Write the original (3, H, W) in [0, 1] and its reconstructions, a row for each of ``rows``, as a PNG.

    Rows may still be growing.
    """
    from matplotlib.figure import Figure

    columns = max(map(len, rows.values())) + 1
    figure = Figure(figsize=(2.3 * columns, 2.7 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    panels[0, 0].imshow(original.permute(1, 2, 0).numpy())
    panels[0, 0].set_title("original", fontsize=9)
    for line, (name, found) in zip(panels, rows.items(), strict=True):
        for panel, result in zip(line[1:], found, strict=False):
            panel.imshow(result.image.permute(1, 2, 0).numpy())
            numbers = f"{result.psnr:.1f} dB, SSIM {result.ssim:.2f}"
            panel.set_title(f"block {result.block} {name}\n{numbers}", fontsize=9)
    save_figure(figure, path, dpi=130)
