"""The results of a run, part by part: a part is written as a whole or not at all, and never computed twice."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from gpt_serve.bulk.inputs import Images
from gpt_serve.errors import UsageError
from gpt_serve.files import replacing

PART = 1024  # images: what a kill can lose

SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("probability", pa.float32()),
        pa.field("known", pa.float32()),
        pa.field("revision", pa.string()),
        pa.field("error", pa.string()),
    ]
)
"""Of the results: a row for each image and task, in the order of the images; either ``error`` or the rest is set.

``known`` is null where the adapter cannot tell strangers."""


Compute = Callable[[list[int]], Iterable[tuple[int, pa.Table]]]


class Parts:
    """The unfinished results beside ``output``, in ``.<output>.parts``.

    Args:
        output: the table to write, ``*.parquet``.
        images: what is predicted.
        tasks: by which adapters.
    """

    def __init__(self, output: Path, images: Images, tasks: Sequence[str]) -> None:
        if output.suffix != ".parquet":
            raise UsageError(f"--output {output}: the name of a table of results ends in .parquet")
        self.output = output
        self.folder = output.with_name(f".{output.name}.parts")
        self.images = len(images)
        self.identity = images.identity()
        self._run = {"input": self.identity, "tasks": list(tasks), "part": PART}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin, or continue, as the only process that does.

        Raises:
            UsageError: another process is at it, the parts that are there belong to another run, or the disk refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock", timeout=0):
                self._check()
                yield
        except Timeout as error:
            raise UsageError(f"{self.output} is being written by another process: wait for it") from error
        except OSError as error:
            raise UsageError(f"--output {self.output} cannot be written: {error.strerror}") from error

    def complete(self, compute: Compute, on_images: Callable[[int], object]) -> dict[str, int]:
        """Compute what is not yet there, and put all together.

        Args:
            compute: gives the rows of each part that it is told, in any order.
            on_images: told how many images an earlier run has done.

        Returns:
            As `finish`.

        Raises:
            UsageError: as `held`.
        """
        with self.held():
            pending = self.pending()
            on_images(self.images - sum(stop - start for start, stop in map(self.range, pending)))
            for part, rows in compute(pending):
                self.write(part, rows)
            return self.finish()

    def range(self, part: int) -> tuple[int, int]:
        """The images of a part, from and to."""
        return part * PART, min((part + 1) * PART, self.images)

    def pending(self) -> list[int]:
        """The parts that are still to be computed."""
        return [part for part in range(-(-self.images // PART)) if not self._path(part).exists()]

    def write(self, part: int, rows: pa.Table) -> None:
        """Keep a part."""
        with replacing(self._path(part)) as temporary:
            pq.write_table(rows, temporary)

    def finish(self) -> dict[str, int]:
        """Put all parts together as the output, and remove them.

        Returns:
            The numbers of ``images``, ``rows`` and ``errors`` in the output.
        """
        rows = errors = 0
        with replacing(self.output) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
            for part in range(-(-self.images // PART)):
                table = pq.read_table(self._path(part), schema=SCHEMA)
                rows += len(table)
                errors += len(table) - table["error"].null_count
                writer.write_table(table)
        shutil.rmtree(self.folder)
        return {"images": self.images, "rows": rows, "errors": errors}

    def _check(self) -> None:
        plan = self.folder / "run.json"
        if not plan.exists():
            plan.write_text(json.dumps(self._run), encoding="utf-8")
        elif json.loads(plan.read_text(encoding="utf-8")) != self._run:
            raise UsageError(
                f"{self.folder} holds parts of another run, of other images or tasks: finish that one, or remove them"
            )

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06}.parquet"
