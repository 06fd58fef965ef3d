"""The search for the gates that close: decided on validation images, with a few fine-tunes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from gpt_serve.adapters.adapter import Adapter, closed_gates
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Reporter, TrainingJob, Views
from gpt_serve.train.loop import Score, Trainer, evaluate
from gpt_serve.train.methods.prompts import AdapterModule

TRIES = 4  # fine-tunes at most
FREE = 1e-3  # what the validation loss may rise by, as a share, when gates close without fine-tuning

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class Candidate:
    """An adapter with more gates closed.

    Attributes:
        gates: the indices in gamma of those that were open before.
        val: on the validation images.
        epochs: of fine-tuning.
        best_epoch: the one that is kept, from 1; 0 for the tensors as they were before fine-tuning.
    """

    adapter: Adapter
    gates: tuple[int, ...]
    val: Score
    epochs: int = 0
    best_epoch: int = 0


class GateSearch:
    """Searches for the gates that can close: the cheapest are tried first, and as many as possible are closed.

    Args:
        adapter: as published.
        work: the recipe of a fine-tune.
    """

    def __init__(
        self, backbone: Backbone, adapter: Adapter, work: TrainingJob, views: Views, reporter: Reporter
    ) -> None:
        assert adapter.gamma is not None
        self.backbone = backbone
        self.adapter = adapter
        self.work = work
        self.views = views
        self.reporter = reporter
        self.open = (~closed_gates(adapter.gamma)).nonzero()[:, 0].tolist()
        self.before = self.untrained(()).val
        self.tried: list[Candidate] = []

    def run(self, tolerance: float) -> Candidate | None:
        """The candidate with the most closed gates that is good enough; None when none is."""
        order = self.order()

        def free(count: int) -> Candidate | None:
            found = self.untrained(order[:count])
            loss = self.before.loss * (1 + FREE)
            return found if found.val.accuracy >= self.before.accuracy and found.val.loss <= loss else None

        def tuned(count: int) -> Candidate | None:
            found = self.fine_tune(order[:count])
            lost = self.before.accuracy - found.val.accuracy
            return found if 100 * lost <= tolerance + 1e-6 else None  # 1e-6: rounding

        at_once = most(0, len(order), free, tries=len(order))
        if at_once is not None:
            self.tried.append(at_once)
        later = most(0 if at_once is None else len(at_once.gates), len(order), tuned, tries=TRIES)
        return later or at_once

    def order(self) -> list[int]:
        """The open gates by the validation loss with that one closed, the lowest first."""
        tick = self.reporter.scanning(len(self.open) * len(self.views.val), "ordering gates")
        losses = {}
        for gate in self.open:
            losses[gate] = self.untrained((gate,)).val.loss
            for _ in range(len(self.views.val)):
                tick()
        return sorted(self.open, key=losses.__getitem__)

    def untrained(self, gates: Collection[int]) -> Candidate:
        """The published tensors with ``gates`` closed."""
        adapter = closed(self.adapter, gates)
        module = self._module(adapter)
        val = evaluate(self.backbone, module, self.views.val, Inputs(self.work.workers))
        return Candidate(adapter, tuple(sorted(gates)), val)

    def fine_tune(self, gates: Sequence[int]) -> Candidate:
        """The best epoch on validation images of a fine-tune with ``gates`` closed, its start included."""
        start = self.untrained(gates)
        recipe, views = self.work.recipe, self.views
        module = self._module(start.adapter)
        trainer = Trainer(
            self.backbone,
            module,
            recipe,
            train=views.train,
            val=views.val,
            world=World(),
            inputs=Inputs(self.work.workers),
        )
        self.reporter.notice(
            f"closing {len(gates)} of {len(self.open)} open gates: validation accuracy"
            f" {100 * start.val.accuracy:.1f} % before fine-tuning, {100 * self.before.accuracy:.1f} % when open"
        )
        self.reporter.training(len(views.train), 0, recipe.epochs)
        progress = trainer.fit(self.reporter.batch, self.reporter.epoch)
        candidate = replace(start, epochs=recipe.epochs)
        if progress.best_record.val.rank(recipe.select) > start.val.rank(recipe.select):
            module.load_state_dict(progress.best)
            candidate = replace(
                candidate,
                adapter=replace(start.adapter, **module.stored()),
                val=progress.best_record.val,
                best_epoch=progress.best_epoch + 1,
            )
        self.tried.append(candidate)
        return candidate

    def _module(self, adapter: Adapter) -> AdapterModule:
        module = AdapterModule.of(adapter, self.backbone.spec, self.work.recipe.prompt_dropout)
        return module.to(self.backbone.device)

    def record(self, kept: Candidate | None, tolerance: float) -> dict[str, Any]:
        """The record of the step that the adapter's metadata keep and its card shows; blocks count from 1."""
        assert self.adapter.gamma is not None
        after = self.before if kept is None else kept.val
        return {
            "closed": [] if kept is None else _blocks(kept.gates),
            "open_before": len(self.open),
            "gates": len(self.adapter.gamma),
            "tolerance": tolerance,
            "val_accuracy": [self.before.accuracy, after.accuracy],
            "val_loss": [self.before.loss, after.loss],
            "epochs": 0 if kept is None else kept.epochs,
            "best_epoch": 0 if kept is None else kept.best_epoch,
            "lr": self.work.recipe.lr,
            "tried": [
                {
                    "closed": _blocks(candidate.gates),
                    "epochs": candidate.epochs,
                    "val_accuracy": candidate.val.accuracy,
                    "val_loss": candidate.val.loss,
                }
                for candidate in self.tried
            ],
        }


def most(low: int, high: int, attempt: Callable[[int], Found | None], tries: int) -> Found | None:
    """The answer of the largest count above ``low`` that ``attempt`` answers; None when it answers none.

    It tries ``high`` first and then halves what is left, at most ``tries`` times.
    """
    count, found = high, None
    while low < high and tries > 0:
        tries -= 1
        answer = attempt(count)
        if answer is None:
            high = count - 1
        else:
            low, found = count, answer
        count = (low + high + 1) // 2
    return found


def closed(adapter: Adapter, gates: Collection[int]) -> Adapter:
    """A copy of ``adapter`` whose gates at these indices are exactly 0."""
    assert adapter.gamma is not None
    gamma = adapter.gamma.clone()
    gamma[list(gates)] = -torch.inf
    return replace(adapter, gamma=gamma)


def _blocks(gates: Sequence[int]) -> list[int]:
    return [gate + 1 for gate in gates]
