"""Runs side by side: each keeps to its own folder, and a task is trained by one process at a time."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import EpochRecord
from gpt_serve.train.recipes.recipe import make_recipe
from tests.tiny_vit import tiny_backbone
from tests.train.conftest import Recorder

RECIPE = make_recipe("adamw", prompts=2, epochs=2, warmup=0, batch_size=8)
CONTEXT = multiprocessing.get_context("spawn")
BUSY = r"^'colours' is being trained in .* by another process: wait for its end, or choose another --task$"


class Meanwhile(Recorder):
    """Something else happens once: at the first step, before anything is stored, or after the first epoch."""

    def __init__(self, what: Callable[[], object], *, after_epoch: bool = False) -> None:
        super().__init__()
        self.what: Callable[[], object] | None = what
        self.after_epoch = after_epoch

    def batch(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        if not self.after_epoch:
            self._once()

    def epoch(self, record: EpochRecord) -> None:
        super().epoch(record)
        self._once()

    def _once(self) -> None:
        if self.what is not None:
            what, self.what = self.what, None
            what()


def train(
    backbone: Backbone, task: str, data: Path, adapters: Path, reporter: Recorder | None = None, resume: bool = False
) -> None:
    job = TrainingJob(task, str(data), adapters, RECIPE, resume=resume)
    assert train_adapter(backbone, job, reporter or Recorder(), World()) is not None


@pytest.mark.parametrize("after_epoch", [False, True])
@pytest.mark.parametrize("other", ["short", "colours.lock", "colours.sweep"])
def test_the_end_of_another_tasks_run_leaves_what_this_one_stores(
    tiny: Backbone, colours: Path, tmp_path: Path, other: str, after_epoch: bool
) -> None:
    ends = Meanwhile(lambda: train(tiny, other, colours, tmp_path), after_epoch=after_epoch)
    train(tiny, "colours", colours, tmp_path, ends)
    assert ends.what is None and AdapterStore(tmp_path).tasks() == sorted(["colours", other])
    assert [path.name for path in (tmp_path / ".train").iterdir() if path.is_dir()] == []


def test_a_task_that_is_being_trained_is_refused_and_the_run_goes_on(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    refused: list[str] = []

    def again() -> None:
        for resume in (False, True):
            with pytest.raises(UsageError, match=BUSY) as caught:
                train(tiny, "colours", colours, tmp_path, resume=resume)
            refused.append(str(caught.value))

    train(tiny, "colours", colours, tmp_path, Meanwhile(again, after_epoch=True))
    assert len(refused) == 2
    train(tiny, "colours", colours, tmp_path)


def hold(data: Path, adapters: Path, running: Event, ended: Event) -> None:
    """Another process: it trains, and stays in the middle of its run until it is told to go on."""

    def wait() -> None:
        running.set()
        ended.wait(300)

    train(tiny_backbone(), "colours", data, adapters, Meanwhile(wait, after_epoch=True))


@pytest.fixture
def busy(colours: Path, tmp_path: Path) -> Iterator[tuple[multiprocessing.process.BaseProcess, Event]]:
    """A process that is in the middle of training ``colours``, and what lets it go on."""
    running, ended = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(colours, tmp_path, running, ended))
    process.start()
    assert running.wait(120)
    yield process, ended
    process.kill()
    process.join()


@pytest.mark.slow
def test_processes_that_train_side_by_side(
    tiny: Backbone, colours: Path, tmp_path: Path, busy: tuple[multiprocessing.process.BaseProcess, Event]
) -> None:
    process, ended = busy
    with pytest.raises(UsageError, match=BUSY):
        train(tiny, "colours", colours, tmp_path)
    train(tiny, "short", colours, tmp_path)
    ended.set()
    process.join(120)
    assert process.exitcode == 0 and AdapterStore(tmp_path).tasks() == ["colours", "short"]


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_its_run_to_be_resumed(
    tiny: Backbone, colours: Path, tmp_path: Path, busy: tuple[multiprocessing.process.BaseProcess, Event]
) -> None:
    process, _ = busy
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(120)
    recorder = Recorder()
    train(tiny, "colours", colours, tmp_path, recorder, resume=True)
    assert [record.epoch for record in recorder.epochs] == [1]
