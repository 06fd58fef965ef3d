"""What training leaves behind when the disk refuses."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.methods.modules import FullModule
from gpt_serve.train.publishing import store_model
from gpt_serve.train.recipes.recipe import make_recipe
from tests.train.conftest import Recorder


@pytest.mark.parametrize("method", ["gated", "full"])
def test_a_disk_that_is_full_ends_with_one_line_and_the_old_files(
    tiny: Backbone, colours: Path, tmp_path: Path, method: str
) -> None:
    recipe = make_recipe("full" if method == "full" else "adamw", method=method, epochs=1, warmup=0)
    stored = tmp_path / ".train" / "colours" / "checkpoint.pt"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"older")
    with file_size_limit(4096), pytest.raises(UsageError, match=r"the checkpoint .* cannot be written: ") as caught:
        train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path, recipe), Recorder(), World())
    assert "\n" not in str(caught.value)
    assert [path.name for path in stored.parent.iterdir()] == ["checkpoint.pt"] and stored.read_bytes() == b"older"


def test_a_fine_tuned_model_that_does_not_fit_leaves_the_old_one(tiny: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")
    module = FullModule(tiny, 2, "small")
    with file_size_limit(4096), pytest.raises(UsageError, match="the fine-tuned model .* cannot be written: "):
        store_model(path, module, ("a", "b"), {})
    assert [each.name for each in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"older"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: for its writer, a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
