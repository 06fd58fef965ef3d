"""Pictures that are easy to segment, with label files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("sky", "grass", "wall")
COLOURS = np.array([(40, 60, 200), (40, 180, 60), (210, 50, 40)], np.uint8)
VOID = 200


def scene(seed: int, height: int = 24, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Sky above grass, a wall somewhere, a void frame at the right: pixels (h, w, 3) and values (h, w)."""
    rng = np.random.default_rng(seed)
    values = np.zeros((height, width), np.uint8)
    values[rng.integers(height // 3, height // 2) :] = 1
    left = rng.integers(0, width // 2)
    values[height // 3 :, left : left + width // 3] = 2
    pixels = COLOURS[values].astype(int) + rng.integers(-30, 30, (height, width, 3))
    values[:, -2:] = VOID
    return pixels.clip(0, 255).astype(np.uint8), values


def write_scene(root: Path, split: str, name: str, seed: int, labels: str = "labels") -> None:
    pixels, values = scene(seed)
    for folder, array, suffix in (("images", pixels, "jpg"), (labels, values, "png")):
        path = root / folder / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, **({"quality": 95} if suffix == "jpg" else {}))


def write_scenes(root: Path, counts: dict[str, int], labels: str = "labels") -> Path:
    """A folder of scenes with ``classes.txt``; `VOID` is to be ignored."""
    for number, (split, count) in enumerate(counts.items()):
        for index in range(count):
            write_scene(root, split, f"{index:02d}", 100 * number + index, labels)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training, 4 validation and 4 test scenes; shared: don't change it."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), {"train": 12, "val": 4, "test": 4})
