"""The built-in data set: scikit-learn's 1,797 handwritten digits."""

from collections import Counter
from functools import partial

import numpy as np
from PIL import Image

from gpt_serve.images.convert import encode_png
from gpt_serve.train.data.samples import Dataset, Sample


def open_digits() -> Dataset:
    """Open the digits: 8x8 grey images as PNG, of which every fifth of a class is for test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train: list[Sample] = []
    test: list[Sample] = []
    seen: Counter[int] = Counter()
    for index, (pixels, target) in enumerate(zip(bunch.images, bunch.target.tolist(), strict=True)):
        sample = Sample(f"digits/{index}", partial(_png, pixels), target)
        (test if seen[target] % 5 == 4 else train).append(sample)
        seen[target] += 1
    return Dataset(tuple(str(digit) for digit in range(10)), train, test=test)


def _png(pixels: np.ndarray) -> bytes:
    """Encode (8, 8) values from 0 to 16 as PNG. The level must stay: adapters record digests of these bytes."""
    return encode_png(Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)), level=6)
