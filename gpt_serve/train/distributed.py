"""One process or several under torchrun: prompts are tiny, so gradients are summed in one call."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt_serve.errors import UsageError

TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets beside WORLD_SIZE
Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The place of this process among all that train together: ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def leader(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, batch: list[Item]) -> list[Item]:
        """The part of a batch that this process computes."""
        return batch[self.rank :: self.size]

    def sum(self, value: Tensor) -> Tensor:
        """``value`` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all processes; one without a share of the batch contributes zeros."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(total.view_as(gradient))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the leader's tensors to every process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)


@contextmanager
def join_world(device: str) -> Iterator[tuple[World, str]]:
    """The world that torchrun set up and this process's device; a world of one without torchrun.

    Raises:
        UsageError: only a part of what torchrun sets is set.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), device
        return
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise UsageError(f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start with torchrun, or unset it")
    on_cuda = device.startswith("cuda")
    if on_cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield World(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()
