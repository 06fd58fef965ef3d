import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from gpt_serve.train import card
from gpt_serve.train.data.views import Unreadable
from gpt_serve.train.loop import EpochRecord

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}


class Recorder:
    """A reporter that remembers; ``interrupt_at`` raises KeyboardInterrupt in the middle of that epoch."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.epochs: list[EpochRecord] = []
        self.bad: list[Unreadable] = []
        self.notices: list[str] = []

    def scanning(self, total: int, what: str = "checking images") -> Callable[[], object]:
        return lambda: None

    def unreadable(self, images: list[Unreadable]) -> None:
        self.bad = images

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def trials(self, total: int, done: int) -> Callable[[], object]:
        return lambda: None

    def training(self, images: int, first_epoch: int, epochs: int) -> None:
        pass

    def batch(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        if epoch == self.interrupt_at:
            raise KeyboardInterrupt

    def epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)


def write_colours(root: Path, split: str, count: int, seed: int) -> None:
    """``count`` noisy pictures of each colour: easy to tell apart, no two alike."""
    rng = random.Random(seed)
    for label, colour in COLOURS.items():
        folder = root / split / label
        folder.mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", (24, 20), tuple(max(0, min(255, c + rng.randint(-40, 40))) for c in colour))
            draw = ImageDraw.Draw(image)
            for _ in range(6):
                x, y = rng.randint(0, 20), rng.randint(0, 16)
                draw.rectangle((x, y, x + 3, y + 3), fill=tuple(rng.randint(0, 255) for _ in range(3)))
            image.save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """Drawing takes most of a short training's time; the plots have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "plot_inspection", lambda *_: None)
        patch.setattr(card, "plot_confusion", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three colours, 10 train and 4 test images each."""
    root = tmp_path_factory.mktemp("colours")
    write_colours(root, "train", 10, seed=0)
    write_colours(root, "test", 4, seed=1)
    return root


def write_pictures(paths: Iterable[Path], size: tuple[int, int] = (12, 10)) -> None:
    """A picture at each path, no two alike; the suffix names the format."""
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60 + index).convert("RGB").save(path)


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of data sets."""
    monkeypatch.setenv("GPT_SERVE_DATA", str(tmp_path / "sets"))
    (tmp_path / "sets").mkdir()
    return tmp_path / "sets"
