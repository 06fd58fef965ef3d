"""Classification heads of a pass: from features to what each row's task says of its image."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt_serve.adapters.unknown import DIGITS, LEAST_KNOWN, MEASURES, known_share
from gpt_serve.engine.bank import Resident
from gpt_serve.engine.slab import gather_heads, on_device
from gpt_serve.model.heads import linear, linear_each, read_taps, stranger_distance
from gpt_serve.specs import DEFAULT_TOP_K

if TYPE_CHECKING:
    from gpt_serve.engine.engine import Features

SMALL_HEAD = {"cpu": 2**14, "cuda": 2**20}
"""Weights of a head up to which it is worth the copy that shares a product with others.

Measured on a CPU with 64 heads: 4 times as fast at 4 thousand weights each, no faster at 38 thousand. The GPU's is an
estimate.
"""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one image.

    Attributes:
        task: the adapter's name.
        revision: the adapter file that computed it, first 12 hex digits of its SHA-256.
        labels: the ``C`` classes.
        probabilities: float32 (C,) on the CPU: summing to 1, or each by itself where images have several labels.
        known: the share of the validation images that lie at least as far from what the task was trained on, in
            [0, 1]; None where the adapter cannot tell.
        thresholds: (C,) probabilities from which on a label is given, where images have several labels; else None.
    """

    task: str
    revision: str
    labels: tuple[str, ...]
    probabilities: Tensor
    known: float | None = None
    thresholds: Tensor | None = None

    @property
    def unknown(self) -> bool | None:
        """Whether the image is a stranger's; 95 % of the validation images are not. None where nobody can tell."""
        return None if self.known is None else self.known < LEAST_KNOWN

    def listed(self, top_k: int | None = None) -> list[tuple[str, float]]:
        """What an answer lists: `top` of ``top_k``, without it of 5, or all labels above their threshold."""
        if top_k is not None or self.thresholds is None:
            return self.top(DEFAULT_TOP_K if top_k is None else top_k)
        return [
            (label, value)
            for label, value in self.top(len(self.labels))
            if value >= self.thresholds[self.labels.index(label)]
        ]

    def to_dict(self, top_k: int | None = None) -> dict[str, Any]:
        """The answer as ``--json`` and HTTP have it; ``known`` and ``unknown`` where the adapter can tell."""
        best = [{"label": label, "probability": probability} for label, probability in self.listed(top_k)]
        strangeness = {} if self.known is None else {"known": self.known, "unknown": self.unknown}
        return {"task": self.task, "revision": self.revision, "predictions": best} | strangeness

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable (label, probability) pairs, best first; fewer when there are fewer classes."""
        values, indices = self.probabilities.topk(min(k, len(self.labels)))
        return [(self.labels[index], value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]


def classify(
    features: "Features", residents: Sequence[Resident], chosen: Sequence[int] | None = None
) -> list[Prediction]:
    """Each row's head and its probabilities in float32, and how strange its image is where the adapter can tell.

    Heads share a product where that pays, and all share one copy back.

    Args:
        residents: of all rows.
        chosen: the rows that are wanted, in their order; None for all.
    """
    chosen = range(len(residents)) if chosen is None else chosen
    members: dict[Resident, list[int]] = {}
    for index in chosen:
        members.setdefault(residents[index], []).append(index)
    device = features.tapped[0].device
    classes = max(len(resident.labels) for resident in members)
    logits = torch.full((len(residents), classes), float("-inf"), device=device)
    for group in _of_one_shape(members, SMALL_HEAD[device.type]):
        rows = on_device([members[resident] for resident in group], device).flatten()
        own = read_taps(features.tapped, features.taps, group[0].place.layout.taps, rows)
        logits[rows, : len(group[0].labels)] = _logits(group, own.float())
    probabilities = logits.softmax(dim=1)
    if several := [index for index in chosen if residents[index].thresholds is not None]:
        rows = on_device(several, device)
        probabilities[rows] = torch.sigmoid(logits[rows])
    distances = _distances(features, members, len(residents))
    scores = torch.cat([probabilities, distances[:, None]], dim=1).cpu().unbind()
    return [_prediction(residents[index], scores[index]) for index in chosen]


def _distances(features: "Features", members: Mapping[Resident, Sequence[int]], count: int) -> Tensor:
    """How far each of ``count`` rows lies from what its task was trained on, (count,); 0 where nobody can tell."""
    device = features.tapped[0].device
    distances = torch.zeros(count, device=device)
    for resident, indices in members.items():
        if resident.knots is not None:
            rows = on_device(indices, device)
            own = read_taps(features.tapped, features.taps, resident.place.layout.taps, rows)
            mean, scale, basis = (resident.place.head_tensors[name].float() for name in MEASURES)
            distances[rows] = stranger_distance(own.float(), mean, scale, basis)
    return distances


def _prediction(resident: Resident, row: Tensor) -> Prediction:
    """What a row says: probabilities of at least the resident's classes, then the distance from what it knows."""
    known = None
    if resident.knots is not None:
        known = round(known_share(resident.knots, row[-1:]).item(), DIGITS)
    own = row[: len(resident.labels)]
    return Prediction(resident.task, resident.revision, resident.labels, own, known, resident.thresholds)


def _of_one_shape(members: Mapping[Resident, Sequence[int]], most: int) -> Collection[list[Resident]]:
    """Adapters whose heads can share a product: small ones of one shape, with as many rows each."""
    groups: dict[Hashable, list[Resident]] = {}
    for resident, rows in members.items():
        place = resident.place
        small = len(resident.labels) * len(place.layout.taps) * place.slab.width <= most
        key = (place.layout.taps, place.form, len(rows)) if small else resident
        groups.setdefault(key, []).append(resident)
    return groups.values()


def _logits(group: Sequence[Resident], features: Tensor) -> Tensor:
    """(G*M, K*D) of the rows of the first adapter, then those of the next, to (G*M, C)."""
    if len(group) == 1:
        weight, bias = group[0].head
        return linear(features, weight.float(), bias.float())
    weight, bias = gather_heads([resident.place for resident in group])
    own = features.view(len(group), -1, features.shape[1])
    return linear_each(own, weight.float(), bias.float()).flatten(0, 1)
