"""What is trained, on which images, and who is told of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpt_serve.train.data.duplicates import Pair
from gpt_serve.train.data.views import Unreadable, View
from gpt_serve.train.inputs import CACHE_BYTES
from gpt_serve.train.loop import EpochRecord
from gpt_serve.train.recipes.recipe import Recipe


class Reporter(Protocol):
    """Is told how a run goes, and shows it to somebody."""

    def scanning(self, total: int, what: str = "checking images") -> Callable[[], object]:
        """So many images are about to be read; call the result after each."""

    def unreadable(self, images: list[Unreadable]) -> None:
        """These images cannot be read."""

    def notice(self, text: str) -> None:
        """One line worth knowing."""

    def batch(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        """A step on so many images was made; loss and accuracy are those of the epoch so far."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is done and stored."""

    def training(self, images: int, first_epoch: int, epochs: int) -> None:
        """Training begins at ``first_epoch`` of ``epochs``, with so many images in each."""


class Silent:
    """A `Reporter` that says nothing."""

    def scanning(self, total: int, what: str = "checking images") -> Callable[[], object]:
        return self.batch

    def batch(self, *_: object) -> None:
        """Nobody is told, whatever it is."""

    unreadable = notice = epoch = training = batch


@dataclass(frozen=True)
class TrainingJob:
    """What to train and where to put it.

    Attributes:
        task: name of the task.
        data: image folder or name of a data set, see `open_dataset`.
        adapters: folder of the adapter store.
        recipe: hyperparameters.
        resume: continue the interrupted run of this task.
        skip_unreadable: train without the images that cannot be read instead of stopping.
        workers: processes that decode when the images exceed the cache.
        nmi: record the mutual information between prompts and patch tokens after each epoch.
        cache_bytes: how many bytes to keep of what frozen blocks give, in a temporary file, see `TrunkInputs`.
        instant: publish what a new task starts from, where that is an answer already, before the first epoch.
    """

    task: str
    data: str
    adapters: Path
    recipe: Recipe
    resume: bool = False
    skip_unreadable: bool = False
    workers: int = 2
    nmi: bool = False
    instant: bool = False
    cache_bytes: int = CACHE_BYTES


@dataclass(frozen=True)
class Views:
    """The splits of a data set as views; ``test`` is None where there are no test images.

    Attributes:
        digest: of all images.
        duplicates: pairs of images of two splits that look the same.
    """

    labels: tuple[str, ...]
    train: View
    val: View
    test: View | None
    digest: str
    duplicates: tuple[Pair, ...] = ()

    @property
    def unseen(self) -> tuple[View, str]:
        """The test images, or validation images where there are none, and what these are called."""
        return (self.val, "validation") if self.test is None else (self.test, "test")
