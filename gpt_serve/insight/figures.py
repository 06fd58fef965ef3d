"""Figures as files."""

from pathlib import Path
from typing import TYPE_CHECKING

from gpt_serve.errors import UsageError
from gpt_serve.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: Path, dpi: int) -> None:
    """Write a figure, in the format that the suffix of ``path`` names (PNG without one), and replace what is there.

    Raises:
        OSError: the disk refuses.
        UsageError: the suffix names no format.
    """
    kind = path.suffix[1:] or "png"
    if kind.lower() not in (known := figure.canvas.get_supported_filetypes()):
        raise UsageError(f"the plot cannot be written to {path}: {kind!r} is none of {', '.join(sorted(known))}")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=kind)
