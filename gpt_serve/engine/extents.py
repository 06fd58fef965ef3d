"""Which parts of a preallocated array are taken: contiguous extents, best fit, neighbours joined when freed."""

from bisect import bisect_left, insort


class Extents:
    """Free and taken extents of ``size`` units; extent ``(start, length)`` covers ``start`` to ``start + length - 1``.

    Not safe to share between threads: the owner holds a lock.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._by_start: list[tuple[int, int]] = [(0, size)] if size else []
        self._by_length: list[tuple[int, int]] = [(size, 0)] if size else []

    @property
    def free(self) -> int:
        """Units that are free, in however many pieces."""
        return sum(length for _, length in self._by_start)

    def take(self, length: int) -> int | None:
        """The start of ``length`` units in the smallest free extent that holds them; None when there is none."""
        place = bisect_left(self._by_length, (length, 0))
        if place == len(self._by_length):
            return None
        found, start = self._by_length[place]
        self._remove(start, found)
        if found > length:
            self._insert(start + length, found - length)
        return start

    def give_back(self, start: int, length: int) -> None:
        """Free what `take` returned."""
        place = bisect_left(self._by_start, (start, 0))
        if place < len(self._by_start) and self._by_start[place][0] == start + length:
            following = self._by_start[place]
            self._remove(*following)
            length += following[1]
        if place and sum(self._by_start[place - 1]) == start:
            previous = self._by_start[place - 1]
            self._remove(*previous)
            start, length = previous[0], previous[1] + length
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        insort(self._by_start, (start, length))
        insort(self._by_length, (length, start))

    def _remove(self, start: int, length: int) -> None:
        del self._by_start[bisect_left(self._by_start, (start, length))]
        del self._by_length[bisect_left(self._by_length, (length, start))]
