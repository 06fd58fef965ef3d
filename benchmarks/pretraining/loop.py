"""Pretraining: epochs over images in memory, a checkpoint after each, the same weights after an interruption."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightly.utils.scheduler import cosine_warmup_schedule
from timm.optim import param_groups_weight_decay
from torch import Tensor

from gpt_serve.errors import UsageError
from gpt_serve.train.checkpoint import RunCheckpoint


@dataclass(frozen=True)
class Recipe:
    """How to pretrain.

    Attributes:
        lr: AdamW's learning rate after the warm-up; it falls to 0 along a cosine.
        warmup: share of the steps in which the rate rises linearly.
        weight_decay: of weight matrices; biases and norms have none.
    """

    method: str
    epochs: int
    batch_size: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: float
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to: ``number`` from 1, mean ``loss``, ``speed`` in images/s, seconds ``left`` to the end."""

    number: int
    loss: float
    speed: float
    left: float


class Run:
    """One pretraining of ``model``, which has ``views``, ``forward`` and ``follow`` as `mae.MAE` has.

    Args:
        pixels: uint8 (N, 3, H, W), on any device.
        checkpoint: where the state is kept after each epoch.
        data: names the images; a run continues only on the same.

    Attributes:
        losses: mean loss of each epoch so far.
        seconds: what they took.
    """

    def __init__(self, model: Any, pixels: Tensor, recipe: Recipe, checkpoint: RunCheckpoint, data: str) -> None:
        if len(pixels) < recipe.batch_size:
            raise UsageError(f"--batch-size {recipe.batch_size} is more than the {len(pixels)} images there are")
        self.model, self.pixels, self.recipe = model, pixels, recipe
        self.checkpoint = checkpoint
        self.identity = asdict(recipe) | {"betas": list(recipe.betas), "data": data}
        self.device = next(model.parameters()).device
        groups = param_groups_weight_decay(model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
        self.losses: list[float] = []
        self.seconds = 0.0

    def resume(self) -> None:
        """Take up the stored state.

        Raises:
            UsageError: there is none, or it belongs to other settings.
        """
        state = self.checkpoint.load(self.identity)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]

    def finish(self, report: Callable[[Epoch], None]) -> None:
        """Train what is left of the epochs.

        Raises:
            UsageError: the loss is no longer finite.
        """
        self.model.train()
        while len(self.losses) < self.recipe.epochs:
            start = time.perf_counter()
            loss = self._epoch(len(self.losses))
            if not math.isfinite(loss):
                raise UsageError(f"the loss of epoch {len(self.losses) + 1} is {loss}: choose a lower --lr")
            seconds = time.perf_counter() - start
            self.losses.append(loss)
            self.seconds += seconds
            self._save()
            left = seconds * (self.recipe.epochs - len(self.losses))
            report(Epoch(len(self.losses), loss, self.steps * self.recipe.batch_size / seconds, left))

    @property
    def steps(self) -> int:
        """Batches of an epoch; the images that fill none are left out, other ones each time."""
        return len(self.pixels) // self.recipe.batch_size

    def _epoch(self, index: int) -> float:
        # Seeded by the epoch, a run needs no state of random number generators to be continued.
        torch.manual_seed(self.recipe.seed * 1_000_000 + index)
        order = torch.randperm(len(self.pixels)).to(self.pixels.device)
        total = torch.zeros((), device=self.device)
        for step in range(self.steps):
            rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
            total += self._step(self.pixels[rows].to(self.device), index * self.steps + step)
        return total.item() / self.steps

    def _step(self, images: Tensor, step: int) -> Tensor:
        recipe, last = self.recipe, self.recipe.epochs * self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_warmup_schedule(step, last, recipe.lr, 0.0, int(recipe.warmup * last), 0.0)
        views = self.model.views(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss: Tensor = self.model(*views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.follow(step / last)
        return loss.detach()

    def _save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoint.save(self.identity, state | {"losses": self.losses, "seconds": self.seconds})
