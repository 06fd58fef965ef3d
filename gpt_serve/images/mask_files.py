"""Masks as PNG files: a pixel is a class id, which a palette colours. Needs Pillow and numpy alone."""

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@cache
def palette() -> bytes:
    """Red, green and blue of ids 0 to 255, as PASCAL VOC colours them: neighbours differ, and 0 is black.

    The three lowest bits of an id are the highest bits of red, green and blue, the next three the second highest, ...
    """
    colours = bytearray()
    for number in range(256):
        for channel in range(3):
            bits = (number >> (3 * place + channel) & 1 for place in range(3))
            colours.append(sum(bit << (7 - place) for place, bit in enumerate(bits)))
    return bytes(colours)


def png(ids: NDArray[np.uint8]) -> bytes:
    """A PNG file with a palette whose pixels are the class ids (h, w)."""
    image = Image.fromarray(ids, "L")
    image.putpalette(palette())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
