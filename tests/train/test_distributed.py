import pytest
import torch
import torch.multiprocessing as multiprocessing

from gpt_serve.errors import UsageError
from gpt_serve.train.distributed import World, join_world
from tests.serve.harness import free_port


def train_as(rank: int, size: int, port: int, data: str, adapters: str) -> None:
    """One torchrun process: the environment that torchrun sets, then the same call as in a single process."""
    import dataclasses
    import os
    from pathlib import Path

    from gpt_serve.train.fit import train_adapter
    from gpt_serve.train.job import TrainingJob
    from tests.tiny_vit import tiny_backbone
    from tests.train.conftest import Recorder
    from tests.train.test_fit import RECIPE

    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # A small rate keeps rounding from growing; batches of 7 leave unequal shares; dropout differs by process: off.
    recipe = dataclasses.replace(RECIPE, epochs=3, batch_size=7, prompt_dropout=0.0, lr=0.001)
    recipe = dataclasses.replace(recipe, norm="standard", head_init="lda")
    with join_world("cpu") as (world, device):
        assert device == "cpu"
        summary = train_adapter(
            tiny_backbone(), TrainingJob("colours", data, Path(adapters), recipe), Recorder(), world
        )
        assert (summary is not None) == world.leader


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_would(colours, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from gpt_serve.adapters.store import AdapterStore

    train_as(0, 1, 0, str(colours), str(tmp_path / "1"))
    multiprocessing.spawn(train_as, (2, free_port(), str(colours), str(tmp_path / "2")), nprocs=2)
    one, two = (AdapterStore(tmp_path / str(size)).load("colours").adapter for size in (1, 2))
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-5, rtol=1e-4)
    assert one.training["metrics"]["val_accuracy"] == two.training["metrics"]["val_accuracy"]


def test_a_world_of_one_needs_no_process_group() -> None:
    with join_world("cpu") as (world, device):
        assert (world, device) == (World(0, 1), "cpu")
        assert world.leader
        assert world.share([1, 2, 3]) == [1, 2, 3]


def test_half_an_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    missing = "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun"
    with pytest.raises(UsageError, match=missing), join_world("cpu"):
        pass
