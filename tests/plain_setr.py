"""SETR-PUP and its auxiliary head, written from the papers as plain modules: the yardstick of the decoder's tests.

Zheng et al. 2021, Sec. 3.2, and the settings of Yoo et al. 2023: independent of ``gpt_serve``.
"""

from typing import Any

from torch import Tensor, nn


class PlainSetr(nn.Module):
    """LayerNorm, four times convolution, BatchNorm and ReLU, upsampling between them, classifier.

    Args:
        width: of the tokens.
        channels: of the convolutions.
        classes: of the classifier.
        grid: patches along the sides.
    """

    def __init__(self, width: int, channels: int, classes: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(width, eps=1e-6)
        layers: list[Any] = []
        for number in range(4):
            convolution = nn.Conv2d(channels if number else width, channels, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
            if number < 3:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, C, 8*gh, 8*gw)."""
        x = self.norm(tokens)
        rows = [x[:, start : start + self.grid[1]] for start in range(0, x.shape[1], self.grid[1])]
        image = x.new_empty(x.shape[0], x.shape[2], *self.grid)
        for y, row in enumerate(rows):
            image[:, :, y] = row.transpose(1, 2)
        return self.classifier(self.layers(image))

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Each convolution with the BatchNorm behind it."""
        kinds = [layer for layer in self.layers if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
        return list(zip(kinds[::2], kinds[1::2], strict=True))
