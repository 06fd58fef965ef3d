"""What a forward pass asks of the device: where the host would have to wait for it, and how many kernels it starts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero, Tensor.masked_select}
WAITING |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}


class HostWaits(Exception):
    """On a GPU the host would wait here until everything before is computed."""


class _NoWaiting(TorchFunctionMode):
    """Raises `HostWaits`; with tensors on the CPU, too, where CUDA itself has nothing to complain about."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made_there = func is torch.tensor and kwargs.get("device") is not None
        targets = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str | torch.device)]
        moved = func is Tensor.to and targets and not kwargs.get("non_blocking")
        if func in WAITING or made_there or moved:
            raise HostWaits(f"{func.__name__}({', '.join(str(value) for value in targets)})")
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device: `HostWaits`, or CUDA's own RuntimeError."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    try:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        with _NoWaiting():
            yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(before)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> int:
    """Kernels that ``call`` starts on a GPU; without one, operations of torch that would start some."""
    if not torch.cuda.is_available():
        with _Operations() as operations:
            call()
        return operations.count
    call()  # whatever happens once only
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    started = ("cudaLaunchKernel", "cuLaunchKernel")
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(started))
