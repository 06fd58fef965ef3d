"""One trial of a sweep, in whatever process runs it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from gpt_serve.errors import DataError, GPTServeError
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Pool
from gpt_serve.train.data.views import Unreadable
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import make_deterministic, new_trainer, prepare
from gpt_serve.train.job import Job, Views
from gpt_serve.train.loop import EpochRecord, Progress
from gpt_serve.train.recipes.recipe import Recipe
from gpt_serve.train.sweep.trials import Outcome


@dataclass(frozen=True)
class BackboneSource:
    """How another process loads the same backbone; see `Backbone.load`."""

    name: str
    checkpoint: Path | None = None
    input_size: int | None = None
    pool: Pool | None = None

    def load(self, device: str) -> Backbone:
        """The backbone on ``device``."""
        return Backbone.load(
            self.name, checkpoint=self.checkpoint, input_size=self.input_size, pool=self.pool, device=device
        )


@dataclass(frozen=True)
class Work:
    """What a process that runs trials needs besides their recipes: small, and equal for all trials.

    Attributes:
        job: where the images are, by absolute path; its recipe is not used but for the split.
        device: ``cpu`` or ``cuda``.
        fingerprint: the backbone's.
        digest: the images'.
    """

    source: BackboneSource
    job: Job
    device: str
    fingerprint: str
    digest: str


def run_trial(work: Work, recipe: Recipe, report: Callable[[Outcome], object]) -> None:
    """Train one recipe and ``report`` what it has come to after each epoch; an error of this package is an outcome."""
    started = time.perf_counter()
    try:
        backbone, views = _open(work)
        trainer = new_trainer(backbone, replace(work.job, recipe=recipe), views, Silent(), World())
        trainer.fit(Silent().batch, lambda _: report(_outcome(trainer.progress, time.perf_counter() - started)))
    except GPTServeError as error:
        report(Outcome(seconds=time.perf_counter() - started, failure=str(error)))


@lru_cache(maxsize=1)
def _open(work: Work) -> tuple[Backbone, Views]:
    """Backbone and images, once for all trials of a process."""
    backbone = work.source.load(work.device)
    make_deterministic(backbone)
    backbone, views = prepare(backbone, work.job, Silent())
    for what, same in (("images", views.digest == work.digest), ("weights", backbone.fingerprint == work.fingerprint)):
        if not same:
            raise DataError(f"the {what} on this machine are not those of the machine that runs the sweep")
    return backbone, views


def _outcome(progress: Progress, seconds: float) -> Outcome:
    best = progress.best_record
    if not math.isfinite(best.val_loss):
        raise DataError(f"the validation loss is not finite in epoch {best.epoch}: lower --lr")
    return Outcome(seconds, progress.epoch, best.epoch, best.val_accuracy, best.val_loss)


class Silent:
    """A `Reporter` that says nothing: the machine that runs the sweep has checked the images and counts the trials."""

    def scanning(self, total: int, what: str = "checking images") -> Callable[[], object]:
        return lambda: None

    def unreadable(self, images: list[Unreadable]) -> None:
        pass

    def notice(self, text: str) -> None:
        pass

    def batch(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        pass

    def epoch(self, record: EpochRecord) -> None:
        pass

    def training(self, images: int, first_epoch: int, epochs: int) -> None:
        pass
