"""The colours in which masks are shown. Needs numpy alone."""

import numpy as np
from numpy.typing import NDArray


def colours(classes: int) -> NDArray[np.uint8]:
    """A colour for each class, uint8 (C, 3), no two alike: Pascal VOC's map from its second one on.

    The bits of a number, three at a time, become the upper bits of red, green and blue.
    """
    numbers = np.arange(1, classes + 1)
    table = np.zeros((classes, 3), np.uint8)
    for shift in range(8):
        for channel in range(3):
            table[:, channel] |= ((numbers >> (3 * shift + channel) & 1) << (7 - shift)).astype(np.uint8)
    return table
