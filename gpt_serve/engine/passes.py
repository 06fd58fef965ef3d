"""Which rows of a batch share a forward pass.

Rows of any mix whose prompts enter the same block may share one, but then none gets more left out than all allow:
prompts are padded to the longest, and a gate counts as closed only where it is closed for all. Sharing saves what each
pass costs beside its rows. Passes are chosen by an estimate of both; on a CPU they are also kept so small that memory
is reused and caches help.

Costs are in row-blocks: what one row costs in one block, about ``24 D^2`` operations.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from gpt_serve.engine.malloc import REUSED_BYTES
from gpt_serve.model.batch import Layout
from gpt_serve.model.heads import HeadForm

OPERATIONS = 24  # of a row in a block, in D^2: query, keys, values and projection 8, MLP 16
HIDDEN = 4  # the MLP's width by D
READING = 4 / OPERATIONS  # keys and values alone


@dataclass(frozen=True)
class Costs:
    """What decides between few large passes and many small ones on one kind of device.

    Attributes:
        overhead: operations that fit into the time which a pass costs beside its rows.
        most_bytes: of the widest activation of a pass, the MLP's hidden layer in float32; None for any number.
    """

    overhead: float
    most_bytes: int | None


# The CPU's are measured (benchmarks/README.md); the GPU's are estimates: a few milliseconds of kernel launches.
COSTS = {"cpu": Costs(2e9, 3 * REUSED_BYTES // 4), "cuda": Costs(5e11, None)}


@dataclass(frozen=True)
class PassPlanner:
    """Plans for one backbone on one kind of device.

    Attributes:
        body: prefix and patch tokens of an image.
        width: ``D``.
    """

    body: int
    width: int
    costs: Costs

    def plan(self, layouts: Sequence[Layout], images: Sequence[Hashable] | None = None) -> list[list[int]]:
        """The passes as indices into ``layouts``, each row in one of them; rows of one layout keep their order.

        Args:
            images: what each row is about; None when no two rows are about the same image.
        """
        images = range(len(layouts)) if images is None else images
        groups: dict[Layout, list[int]] = {}
        for index, layout in enumerate(layouts):
            groups.setdefault(layout, []).append(index)
        merged = self._merge(sorted(groups.items(), key=lambda item: self.image(item[0])), images)
        return [part for layout, rows in merged for part in self._split(layout, sorted(rows), images)]

    def rows(self, layout: Layout, count: int, images: int) -> float:
        """Row-blocks of a pass of ``count`` rows about ``images`` images, which share the trunk."""
        trunk = self.trunk(layout)
        return count * (self.image(layout) - trunk) + images * trunk

    def trunk(self, layout: Layout) -> float:
        """Row-blocks of one image that all rows about it share: all of them where no block is the task's own."""
        return min(float(self.body * min(layout.trunk, layout.last + 1)), self.image(layout))

    def image(self, layout: Layout) -> float:
        """Row-blocks of one image."""
        prompts, last = layout.prompts, layout.last
        attending = prompts * self.body / (6 * self.width)  # scores and weighted values: 4 * body * P * D operations
        cost = float(self.body * last)
        for block in range(layout.first_block if prompts else last, last):
            if block >= layout.entry:
                cost += prompts * (READING if layout.closed[block] else 1)
            cost += attending
        keys = READING * prompts if layout.entry <= last else 0.0
        if layout.reads_class_token_last:
            return cost + READING * self.body + keys
        return cost + self.body + attending + (keys if layout.reads_prompts_last else prompts)

    def head(self, form: HeadForm, grid: tuple[int, int]) -> float:
        """Row-blocks of the head of one image, where it is worth counting."""
        return form.operations(grid[0] * grid[1]) / (OPERATIONS * self.width**2)

    def _merge(
        self, groups: list[tuple[Layout, list[int]]], images: Sequence[Hashable]
    ) -> list[tuple[Layout, list[int]]]:
        """Join neighbours (by cost) while that saves more than it wastes, the most saving pair first."""
        overhead = self.costs.overhead / (OPERATIONS * self.width**2)

        def cost(layout: Layout, rows: Sequence[int]) -> float:
            return self.rows(layout, len(rows), len({images[row] for row in rows}))

        def saved(one: tuple[Layout, list[int]], other: tuple[Layout, list[int]]) -> float:
            if one[0].prompts and other[0].prompts and one[0].first_block != other[0].first_block:
                return -math.inf
            together = cost(Layout.joined([one[0], other[0]]), one[1] + other[1])
            return overhead + cost(*one) + cost(*other) - together

        while len(groups) > 1:
            savings = [saved(one, other) for one, other in zip(groups, groups[1:], strict=False)]
            best = max(range(len(savings)), key=savings.__getitem__)
            if savings[best] <= 0:
                break
            (one, first), (other, second) = groups[best : best + 2]
            groups[best : best + 2] = [(Layout.joined([one, other]), first + second)]
        return groups

    def _split(self, layout: Layout, rows: list[int], images: Sequence[Hashable]) -> list[list[int]]:
        """Parts of equal size within ``most_bytes``; rows of one image stay together where its trunk is shared."""
        if self.costs.most_bytes is None:
            return [rows]
        most = max(1, self.costs.most_bytes // (HIDDEN * 4 * self.width * (self.body + layout.prompts)))
        rank = {image: number for number, image in enumerate(dict.fromkeys(images[row] for row in rows))}
        if layout.trunk:
            rows = sorted(rows, key=lambda row: rank[images[row]])
        # Where all blocks are trunk, an image takes the same room however many rows are about it.
        units = [rank[images[row]] for row in rows] if layout.trunk > layout.last else list(range(len(rows)))
        count = units[-1] + 1
        parts: list[list[int]] = [[] for _ in range(-(-count // most))]
        for unit, row in zip(units, rows, strict=True):
            parts[unit * len(parts) // count].append(row)
        return parts


def opened(layout: Layout) -> Layout:
    """``layout`` with nothing left out for closed gates."""
    closed = tuple(block < layout.first_block or not layout.prompts for block in range(len(layout.closed)))
    return replace(layout, closed=closed, remembered=0)
