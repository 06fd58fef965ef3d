"""How long work takes: what keeps a batch short and shares fair."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gpt_serve.engine.engine import Row

SHORT_SECONDS, FEW_ROWS, MOST_SECONDS = 0.05, 4, 1.0
"""A pass holds rows that are expected to take a short time together, or else a few rows, but none that take too long.

Whoever comes meanwhile waits for its end. On a fast device a short time is enough for large batches; on a slow one more
rows gain little: of ViT-S on a CPU, 8 rows take 0.73 of the time of 8 passes. A single row may take as long as it does.
"""
SLOW_SECONDS, FAR_FROM = 0.25, 4
"""A row that is expected to take longer, and so many times as long as the cheapest rows that there were, is slow."""
_UNKNOWN = 2  # rows in the first pass over rows of a worth that has not been measured
_FORGET = 1.05  # a measured speed counts for less with each pass, so that one that no longer holds is replaced
_PIXEL, _BYTE = 3e-8, 1e-8  # seconds of decoding: WebP's, which lies between JPEG's third of it and PNG's triple


def decode_seconds(pixels: int, size: int) -> float:
    """About how long an image of ``pixels`` and ``size`` bytes takes to be decoded."""
    return _PIXEL * pixels + _BYTE * size


@dataclass
class _Image:
    """The rows of a pass about one image: how many, how many of them have blocks of their own, the sum of trunks.

    Each of them stands for as many as it has ``windows``.
    """

    windows: int
    rows: int = 0
    apart: int = 0
    trunks: float = 0.0

    @property
    def trunk(self) -> float:
        """What the shared blocks cost. The tasks may share different ones: this is about what they share."""
        return self.trunks / self.rows if self.rows else 0.0

    @property
    def computed(self) -> int:
        return self.windows * (self.apart + (self.rows > self.apart))


class Load:
    """Rows of a pass, and what they are worth together: those about one image share its trunk (`Row.trunk`).

    Attributes:
        rows: how many there are.
        work: what they cost together, in row-blocks.
        largest: what the dearest of them would cost alone.
        computed: how many rows a block computes at most: one for each image and task, but only one for all tasks of
            an image that have no block of their own. Of an image that several inputs cover, each of these counts.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = self.computed = 0
        self.work = self.largest = 0.0
        self._images: dict[int, _Image] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """One row more."""
        image = self._images.setdefault(id(row.image), _Image(row.windows))
        self.work -= image.trunk
        self.computed -= image.computed
        image.rows += 1
        image.apart += row.trunk < row.work
        image.trunks += row.trunk
        self.rows += 1
        self.work += image.trunk + row.work - row.trunk
        self.computed += image.computed
        self.largest = max(self.largest, row.work)

    def share(self, row: Row) -> float:
        """The part of `work` that one of the rows accounts for: tasks of one image pay for its trunk in equal parts."""
        image = self._images[id(row.image)]
        return (row.work - row.trunk + image.trunk / image.rows) / self.work


class Pace:
    """Seconds that passes take by what their rows are worth (`Load.work`), as measured.

    Rows of much different worth are measured apart, because what a row is worth is an estimate, too. The fastest pass
    counts: the slow ones had few rows or were disturbed.

    Attributes:
        row_seconds: seconds that the largest row of the last pass took.
    """

    def __init__(self) -> None:
        self.row_seconds = 0.0
        self._seconds: dict[int, float] = {}  # of one unit of work, by the magnitude of the largest row

    def learn(self, load: Load, seconds: float) -> None:
        """A pass over these rows took so long."""
        self.row_seconds = seconds * load.largest / load.work
        key, measured = _magnitude(load.largest), seconds / load.work
        self._seconds[key] = min(_FORGET * self._seconds.get(key, measured), measured)

    def fits(self, load: Load) -> bool:
        """Whether a pass over these rows ends soon enough; of rows not measured yet, a few do."""
        unit = self._seconds.get(_magnitude(load.largest))
        if unit is None:
            return load.computed <= _UNKNOWN
        return load.work * unit <= min(MOST_SECONDS, max(SHORT_SECONDS, FEW_ROWS * load.largest * unit))

    def is_slow(self, seconds: float) -> bool:
        """Whether a row that is expected to take so long would hold the others up: long, and by far not like them."""
        cheapest = min((2**key * unit for key, unit in self._seconds.items()), default=seconds)
        return seconds > max(SLOW_SECONDS, FAR_FROM * cheapest)

    def row(self, work: float) -> float:
        """Seconds that a row worth ``work`` takes beside others like it."""
        return work * self._seconds.get(_magnitude(work), 0.0)


def _magnitude(work: float) -> int:
    return round(math.log2(work))
