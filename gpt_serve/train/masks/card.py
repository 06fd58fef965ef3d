"""The model card beside a segmentation adapter: a README and pictures, for people; the server never reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.files import replacing
from gpt_serve.images.convert import encode_png
from gpt_serve.images.mask_files import palette
from gpt_serve.insight.inspect import inspect_adapter, plot_inspection
from gpt_serve.train.card import block_table, fact_lines, training_lines
from gpt_serve.train.masks.samples import NOTHING, Ids

LONGEST = 480  # pixels of a picture's longer side in the card
_GAP = 4


@dataclass(frozen=True)
class Example:
    """A picture, uint8 (3, h, w), the ids of its pixels, and the mask that was predicted, (h, w) each."""

    image: Tensor
    ids: Ids
    mask: Ids


def write_mask_card(folder: Path, adapter: Adapter, revision: str, split: str, examples: Sequence[Example]) -> None:
    """Write ``README.md``, ``gates.png`` and ``masks.png`` into the adapter's folder, each as a whole.

    Raises:
        OSError: the disk refuses.
    """
    inspection = inspect_adapter(adapter)
    plot_inspection(inspection, f"{adapter.task} ({adapter.method})", folder / "gates.png")
    with replacing(folder / "masks.png") as temporary:
        temporary.write_bytes(encode_png(examples_image(examples), level=9))
    text = card_text(adapter, revision, split, block_table(inspection))
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def examples_image(examples: Sequence[Example]) -> Image.Image:
    """Rows of a picture, its label file and its mask, side by side, coloured as masks are; white for no class."""
    table = _colours()
    table[NOTHING] = 255
    rows = []
    for example in examples:
        picture = example.image.permute(1, 2, 0).numpy()
        shown = [_small(part) for part in (picture, table[example.ids], table[example.mask])]
        gap = np.full((shown[0].shape[0], _GAP, 3), 255, np.uint8)
        rows.append(np.concatenate([shown[0], gap, shown[1], gap, shown[2]], axis=1))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return Image.fromarray(np.concatenate(padded)).quantize(128)


def _small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.NEAREST)
    return np.asarray(image)


def card_text(adapter: Adapter, revision: str, split: str, blocks: Sequence[str]) -> str:
    """The model card in Markdown; ``blocks`` from `block_table`."""
    head = "a SETR-PUP decoder" if adapter.decoder else "a linear head on each patch"
    lines = [
        f"# {adapter.task}",
        "",
        f"A segmentation adapter for the frozen backbone `{adapter.backbone}`: {len(adapter.labels)} classes, {head}, "
        f"trained with the method `{adapter.method}`. Images are covered by `{adapter.preprocess.crop_mode}`.",
        "",
        *fact_lines(adapter, revision),
        f"![{split} pictures, their labels and predicted masks](masks.png)",
        "",
        f"From left to right: a {split} picture, its label file (white: no class), the mask.",
        "",
        f"| class | colour | IoU on {split} pictures |",
        "|---|---|---|",
        *_class_rows(adapter),
        "",
        "![gates, temperatures and selection ratio](gates.png)",
        "",
        "## Blocks",
        "",
        *blocks,
        "",
        *training_lines(adapter.training),
    ]
    return "\n".join(lines)


def _colours() -> NDArray[np.uint8]:
    """Red, green and blue of each id, (256, 3)."""
    return np.frombuffer(palette(), np.uint8).reshape(-1, 3).copy()


def _class_rows(adapter: Adapter) -> list[str]:
    rows = []
    for colour, (label, iou) in zip(_colours(), adapter.training["iou"].items(), strict=False):
        shown = "does not occur" if iou is None else f"{100 * iou:.1f} %"
        rows.append(f"| {label} | `#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}` | {shown} |")
    return rows
