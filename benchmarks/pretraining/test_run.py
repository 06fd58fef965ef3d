"""``run.py``, once through: images in, weights and card out. Needs the extra ``pretrain``; no part of the suite."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import TINY

SCRIPT = Path(__file__).with_name("run.py")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten small images for each of two classes, to learn from and to test on."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in "ab":
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(10):
                noise = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{index}.png")
    return tmp_path / "images"


def run(*arguments: object) -> list[str]:
    """Lines that the script printed."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(("method", "pool"), [("mae", "mean"), ("mocov3", "cls")])
def test_images_become_weights_that_load_as_a_backbone(images: Path, tmp_path: Path, method: str, pool: str) -> None:
    pytest.importorskip("lightly")
    output = tmp_path / "out"
    options = ["--output", output, "--method", method, "--epochs", 2, "--batch-size", 8]
    lines = run("train", "--data", images, *options, "--probe", images)
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]
    weights = output / f"{method}-vit-tiny-32.safetensors"
    assert sorted(path.name for path in output.iterdir() if path.is_file() and path.suffix != ".npy") == sorted(
        ["README.md", weights.name]
    )
    assert "40 images of images (train, test)" in (output / "README.md").read_text(encoding="utf-8")
    backbone = Backbone.load(TINY.name, checkpoint=weights)
    assert (backbone.family, backbone.spec.pool) == (method, pool)


def test_evaluate_compares_weights_without_the_extra(images: Path) -> None:
    lines = run("evaluate", "--data", images)
    assert lines[0] == "| weights | images, k-NN (10) | images, linear probe |"
    assert lines[2].startswith("| bundled (")
