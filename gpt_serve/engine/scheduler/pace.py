"""How long work takes: what keeps a batch short and shares fair."""

import math
from collections.abc import Sequence

MOST_SECONDS = 1.0
"""A pass holds no more rows than are expected to take so long; a single row may take longer."""
_UNKNOWN = 2  # rows in the first pass over rows of a worth that has not been measured
_FORGET = 1.05  # a measured speed counts for less with each pass, so that one that no longer holds is replaced
_PIXEL, _BYTE = 3e-8, 1e-8  # seconds of decoding: WebP's, which lies between JPEG's third of it and PNG's triple


def decode_seconds(pixels: int, size: int) -> float:
    """About how long an image of ``pixels`` and ``size`` bytes takes to be decoded."""
    return _PIXEL * pixels + _BYTE * size


class Pace:
    """Seconds that passes take by what their rows are worth (`gpt_serve.engine.engine.Row.work`), as measured.

    Rows of much different worth are measured apart, because what a row is worth is an estimate, too. The fastest pass
    counts: the slow ones had few rows or were disturbed.

    Attributes:
        row_seconds: seconds a row took in the last pass.
    """

    def __init__(self) -> None:
        self.row_seconds = 0.0
        self._seconds: dict[int, float] = {}  # of one unit of work, by the magnitude of the largest row

    def learn(self, work: Sequence[float], seconds: float) -> None:
        """A pass over rows worth ``work`` took so long."""
        self.row_seconds = seconds / len(work)
        key, measured = _magnitude(work), seconds / sum(work)
        self._seconds[key] = min(_FORGET * self._seconds.get(key, measured), measured)

    def fits(self, work: Sequence[float]) -> bool:
        """Whether a pass over rows worth ``work`` ends soon enough; of rows not measured yet, a few do."""
        unit = self._seconds.get(_magnitude(work))
        return len(work) <= _UNKNOWN if unit is None else sum(work) * unit <= MOST_SECONDS

    def row(self, work: float) -> float:
        """Seconds that a row worth ``work`` takes beside others like it."""
        return work * self._seconds.get(_magnitude([work]), 0.0)


def _magnitude(work: Sequence[float]) -> int:
    return round(math.log2(max(work)))
