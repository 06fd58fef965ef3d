"""Where training computes: processes of this machine, or of a Ray cluster. The only file that knows either."""

import logging
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock, Thread
from typing import Any

from gpt_serve.errors import UsageError
from gpt_serve.train.job import Reporter
from gpt_serve.train.relay import Relay, Replay

CPUS_PER_TRIAL = 4
Machine = Mapping[str, float]  # the number of each of its resources, by Ray's names: CPU, GPU
Submit = Callable[..., Future[Any]]  # takes a function and its arguments; BrokenExecutor where its process died
Workers = Callable[[int | None], AbstractContextManager[Submit]]  # so many processes at a time, or as many as fit


@contextmanager
def local_workers(device: str, jobs: int | None) -> Iterator[Submit]:
    """Processes of this machine that share its cores and GPUs: one a GPU by default, or one for every four cores."""
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    jobs = jobs or gpus or max(1, (os.cpu_count() or 1) // CPUS_PER_TRIAL)
    context = multiprocessing.get_context("spawn")
    lifeline, end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, context, _set_up, (jobs, gpus, context.Value("i", 0), lifeline))
    try:
        yield pool.submit
        pool.shutdown()
    finally:  # after a failure or an interrupt nothing is waited for
        end.close()
        pool.shutdown(cancel_futures=True)


def _set_up(jobs: int, gpus: int, started: Any, lifeline: Connection) -> None:
    """Give a process its share of the machine, and its end when the pool ends or the command is killed."""
    import torch
    from tqdm import tqdm

    def follow() -> None:
        with suppress(EOFError):
            lifeline.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the command's to handle
    Thread(target=follow, daemon=True).start()
    tqdm.set_lock(RLock())  # its own is a semaphore, which a process that is ended leaves behind
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    with started.get_lock():
        started.value += 1
        if gpus:
            torch.cuda.set_device(started.value % gpus)


@contextmanager
def ray_cluster(address: str) -> Iterator[list[Machine]]:
    """A Ray cluster while it is used, and what each of its machines has.

    Args:
        address: of the cluster as ``ray.init`` has it: ``auto``, or HOST:PORT.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be used.
    """
    if address.startswith("ray://"):  # this machine would be no part of the cluster, nor would its folders
        raise UsageError(
            f"--ray-address {address}: run the command on a machine of the cluster, with auto or HOST:PORT"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of what it will do some day
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--ray-address needs Ray ({error}): pip install 'gpt-serve[ray]'") from error
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise UsageError(f"Ray cannot be used (--ray-address {address}): {' '.join(str(error).split())}") from error
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


@contextmanager
def ray_workers(address: str, device: str, jobs: int | None) -> Iterator[Submit]:
    """Processes of a Ray cluster, each with its share of cores and GPUs.

    Raises:
        BrokenExecutor: from a future, the process that computed it died.
        UsageError: as `ray_cluster`.
    """
    with ray_cluster(address) as machines:
        import ray
        from ray.exceptions import RayError, RayTaskError

        jobs, options = shares(machines, device, jobs)
        waiting = ThreadPoolExecutor(jobs)  # Ray alone would run as many as there is room for

        def run(function: Callable[..., Any], *args: Any) -> Any:
            try:
                return ray.get(ray.remote(max_retries=0, **options)(function).remote(*args))
            except RayTaskError:  # what the function itself raised
                raise
            except RayError as error:
                raise BrokenExecutor(type(error).__name__) from error

        try:
            yield lambda function, *args: waiting.submit(run, function, *args)
        except RayTaskError as error:
            raise error.cause from error
        finally:
            waiting.shutdown(wait=False, cancel_futures=True)


@contextmanager
def ray_relay(reporter: Reporter) -> Iterator[Relay]:
    """A reporter that can be sent to a process of the cluster, and there tells ``reporter`` here."""
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    thread = Thread(target=_replay, args=(queue, Replay(reporter)), name="reports", daemon=True)
    thread.start()
    try:
        yield Relay(_Sender(queue))
        queue.put(None)
        thread.join()
    finally:
        queue.shutdown()  # also ends a thread that still waits


@dataclass(frozen=True)
class _Sender:
    """A queue as `gpt_serve.train.relay.Send`."""

    queue: Any

    def __call__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.queue.put((name, arguments))


def _replay(queue: Any, replay: Replay) -> None:
    from ray.exceptions import RayError

    with suppress(RayError):  # the run was interrupted, and the queue is gone
        while message := queue.get():
            replay.tell(*message)


def unshared(adapters: Path) -> UsageError:
    """What a process says that does not see the folder of the command."""
    return UsageError(
        f"{adapters} on {socket.gethostname()} is another folder than the command's: "
        "--adapters must be on a disk that all machines of the cluster share"
    )


def shares(machines: Sequence[Machine], device: str, jobs: int | None) -> tuple[int, dict[str, float]]:
    """How many trials run at a time, and what each of them asks Ray for, by what the machines have.

    Raises:
        UsageError: there is no GPU for ``cuda``.
    """
    able = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if device == "cuda" and not able:
        raise UsageError("--device cuda: Ray sees no GPU: use --device cpu")
    if device != "cpu" and able:
        machines = able  # the cores of others are of no use to a trial that needs a GPU beside them
    cores, gpus = (int(sum(machine.get(name, 0) for machine in machines)) for name in ("CPU", "GPU"))
    gpus = 0 if device == "cpu" else gpus
    jobs = jobs or gpus or max(1, cores // CPUS_PER_TRIAL)
    # A trial runs on one machine, however large the cluster is.
    largest = max(int(machine.get("CPU", 1)) for machine in machines)
    cpus = max(1, min(cores // jobs, largest))
    return jobs, {"num_cpus": cpus, "num_gpus": 1 / math.ceil(jobs / gpus) if gpus else 0}
