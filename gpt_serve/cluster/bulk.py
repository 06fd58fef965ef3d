"""Folders and tables of images on a Ray cluster: Ray Data hands parts to actors that hold an engine each.

The command keeps what comes back, so its output need not be on a disk that other machines see, and an interrupted run
is continued as one of this machine is, there or on a cluster.
"""

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gpt_serve.bulk.inputs import Images, open_images
from gpt_serve.bulk.parts import Parts
from gpt_serve.bulk.predict import predict_part
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import DataError, GPTServeError, UsageError, revive
from gpt_serve.train.workers import Machine, ray_cluster


@dataclass(frozen=True)
class Work:
    """What every actor gets.

    Attributes:
        engine: makes an engine that has the tasks; must pickle.
        tasks: by which adapters.
        source: see `open_images`; with absolute paths.
        column: see `open_images`.
    """

    engine: Callable[[], Engine]
    tasks: tuple[str, ...]
    source: str
    column: str | None


def predict_on_ray(
    address: str, device: str, work: Work, parts: Parts, on_images: Callable[[int], object]
) -> dict[str, int]:
    """`predict_in_bulk` on the cluster at ``address``.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        on_images: told how many images are done, a part at a time.

    Raises:
        GPTServeError: as `predict_in_bulk`; a machine has other images than this one; or the cluster cannot be used.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: Ray chooses among the GPUs of its machines: use auto, cpu or cuda")
    with ray_cluster(address) as machines:
        return parts.complete(lambda pending: _computed(machines, device, work, parts, pending, on_images), on_images)


def _computed(
    machines: Sequence[Machine],
    device: str,
    work: Work,
    parts: Parts,
    pending: list[int],
    on_images: Callable[[int], object],
) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each pending part, as they come."""
    most, options = actors(machines, device)
    for row in _rows(work, parts, pending, min(most, len(pending)), options):
        if row["error"]:
            raise revive(row["error"], row["message"])
        start, stop = parts.range(row["part"])
        on_images(stop - start)
        yield row["part"], pa.ipc.open_stream(row["rows"]).read_all()


def _rows(
    work: Work, parts: Parts, pending: list[int], most: int, options: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """What `Predictor` gives for each part."""
    if not pending:
        return
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError, RayTaskError

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    spans = [{"part": part, "start": parts.range(part)[0], "stop": parts.range(part)[1]} for part in pending]
    # A part is a block, so that whoever is free takes the next one.
    data = ray.data.from_items(spans, override_num_blocks=len(spans)).map_batches(
        Predictor,
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=most),
        fn_constructor_args=(work, parts.identity),
        **options,
    )
    try:
        yield from data.iter_rows()
    except RayTaskError:  # raised by `Predictor`: a bug
        raise
    except RayError as error:
        raise UsageError(
            f"the cluster did not finish ({type(error).__name__}): what is done is kept, repeat the command"
        ) from error


def actors(machines: Sequence[Machine], device: str) -> tuple[int, dict[str, float]]:
    """How many actors there is room for, and what each asks for: a GPU and its share of cores, or a machine's cores.

    Where machines differ, the one with the fewest cores decides, so that none is left out.

    Raises:
        UsageError: there is no GPU for ``cuda``, or no core at all.
    """
    able = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if device == "cuda" and not able:
        raise UsageError("--device cuda: Ray sees no GPU: use --device cpu")
    if able and device != "cpu":
        cpus = min(machine.get("CPU", 0) // machine["GPU"] for machine in able)
        return int(sum(machine["GPU"] for machine in able)), {"num_cpus": cpus, "num_gpus": 1}
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if not cores:
        raise UsageError("Ray sees no core: start it with --num-cpus on the machines that are to compute")
    return sum(count // min(cores) for count in cores), {"num_cpus": min(cores)}


class Predictor:
    """An actor that holds an engine, and computes one part after another.

    Errors travel as values: Ray would repeat what raises, and wrap the reason.
    """

    def __init__(self, work: Work, identity: str) -> None:
        self._work, self._identity = work, identity
        self._loaded: tuple[Engine, Images] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """One part."""
        (part,), (start,), (stop,) = batch["part"], batch["start"], batch["stop"]
        row = {"part": int(part), "rows": b"", "error": "", "message": ""}
        try:
            row["rows"] = self._compute(int(start), int(stop))
        except GPTServeError as error:
            row |= {"error": type(error).__name__, "message": str(error)}
        return {name: [value] for name, value in row.items()}

    def _compute(self, start: int, stop: int) -> bytes:
        if self._loaded is None:
            images = open_images(self._work.source, self._work.column)
            if images.identity() != self._identity:
                raise DataError(
                    f"--input {self._work.source} on {socket.gethostname()} does not hold the images of the machine "
                    "that runs the command: use a disk that all machines share, or a bucket"
                )
            self._loaded = self._work.engine(), images
        engine, images = self._loaded
        table = predict_part(engine, self._work.tasks, images, (start, stop))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())
