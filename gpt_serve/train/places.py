"""Where one training computes: in this process, or on a machine of a Ray cluster. The command is the same for both."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.checkpoint import run_folder
from gpt_serve.train.closing.close import ClosingJob, close_gates
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import Reporter, TrainingJob
from gpt_serve.train.loading import BackboneFacts, LoadArguments, backbone_facts, load_backbone
from gpt_serve.train.masks.fit import train_masks
from gpt_serve.train.masks.recipe import MaskRecipe
from gpt_serve.train.recipes.choice import Pretrained
from gpt_serve.train.relay import Relay
from gpt_serve.train.workers import Submit, ray_relay, ray_workers, unshared


class Place(Protocol):
    """Where a backbone is, or will be, loaded."""

    @property
    def backbone(self) -> Pretrained:
        """What the choice of a recipe depends on."""

    @property
    def leader(self) -> bool:
        """Whether this process talks to the user."""

    def train(self, job: TrainingJob, reporter: Reporter) -> dict[str, Any] | None:
        """See `train_adapter`."""

    def close(self, job: ClosingJob, reporter: Reporter) -> dict[str, Any]:
        """See `close_gates`."""


@dataclass(frozen=True)
class Here:
    """This process, perhaps one of several under torchrun."""

    backbone: Backbone
    world: World

    @property
    def leader(self) -> bool:
        """See `World.leader`."""
        return self.world.leader

    def train(self, job: TrainingJob, reporter: Reporter) -> dict[str, Any] | None:
        """See `train_adapter`."""
        return _fitted(self.backbone, job, reporter, self.world)

    def close(self, job: ClosingJob, reporter: Reporter) -> dict[str, Any]:
        """See `close_gates`."""
        return close_gates(self.backbone, job, reporter)


@dataclass(frozen=True)
class OnRay:
    """A process of a Ray cluster; this one loads no backbone.

    Attributes:
        submit: runs a function there.
        load: how the backbone is loaded.
        backbone: what is known of it.
    """

    submit: Submit
    load: LoadArguments
    backbone: BackboneFacts
    leader: bool = True

    def train(self, job: TrainingJob, reporter: Reporter) -> dict[str, Any] | None:
        """See `train_adapter`."""
        summary: dict[str, Any] = self._run(_train, job, reporter)
        return summary

    def close(self, job: ClosingJob, reporter: Reporter) -> dict[str, Any]:
        """See `close_gates`."""
        step: dict[str, Any] = self._run(close_gates, job, reporter)
        return step

    def _run(self, function: Callable[..., Any], job: Any, reporter: Reporter) -> Any:
        with _mark(job.adapters) as mark, ray_relay(reporter) as relay:
            return self.submit(_run_there, self.load, mark, function, job, relay).result()


@contextmanager
def on_ray(address: str, load: LoadArguments) -> Iterator[OnRay]:
    """A place on a machine of a Ray cluster that has what ``load``'s device needs.

    Raises:
        UsageError: as `ray_workers`, the options do not go together, or the process there died.
    """
    device = dict(load)["device"]
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: Ray chooses among the GPUs of its machines: use auto, cpu or cuda")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--ray-address trains in one process: start the command without torchrun")
    try:
        with ray_workers(address, device, 1) as submit:
            yield OnRay(submit, load, submit(backbone_facts, load).result())
    except BrokenExecutor as error:
        raise UsageError(
            f"the process that trained died ({error}): it may have run out of memory; "
            "--resume goes on after the last epoch that was finished"
        ) from error


def _run_there(load: LoadArguments, mark: Path, function: Callable[..., Any], job: Any, relay: Relay) -> Any:
    if not mark.exists():
        raise unshared(job.adapters)
    return function(load_backbone(load), job, relay)


def _train(backbone: Backbone, job: TrainingJob, reporter: Reporter) -> dict[str, Any] | None:
    return _fitted(backbone, job, reporter, World())


@contextmanager
def _mark(adapters: Path) -> Iterator[Path]:
    """A file that another machine sees if it has the same folder; it goes when the block ends."""
    mark = run_folder(adapters, f".shared-{uuid4().hex}")  # no task's name begins with a dot
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise UsageError(f"the folder {mark.parent} cannot be made or written to: {error.strerror}") from error
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _fitted(backbone: Backbone, job: TrainingJob, reporter: Reporter, world: World) -> dict[str, Any] | None:
    """Train for the kind of task that the recipe is for."""
    fit = train_masks if isinstance(job.recipe, MaskRecipe) else train_adapter
    return fit(backbone, job, reporter, world)
