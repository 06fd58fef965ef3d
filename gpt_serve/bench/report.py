"""What was measured, where: kept as JSON, merged with what other runs measured, written as tables."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from gpt_serve.bench.targets import targets
from gpt_serve.bench.timing import Plan, Ratio, Row
from gpt_serve.errors import UsageError
from gpt_serve.files import replacing

TITLES = {
    "export": "Exported graphs: a naive export against torch and the folded ones",
    "peers": "Peers: the engine against other ways to serve many tasks",
    "mixed": "Batches: one task against many, through the engine",
    "tasks": "Tasks in a batch: one against many",
    "prompts": "Prompts: timm's own forward pass against the engine's",
    "engines": "Engines: torch against onnxruntime",
    "bank": "Bank: all adapters resident against 100 of them",
    "cold": "Cold adapters: an answer from a resident adapter against one from disk",
    "overhead": "Overhead: the forward pass on ready tensors against the engine",
    "http": "Server: the engine alone against saturated HTTP",
    "soak": "Soak: memory of the process under churn",
}


@dataclass(frozen=True)
class Table:
    """One benchmark on one backbone, as text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return a heading and a table; numbers are aligned to the right."""
        rule = ["---", "---"] + ["---:"] * (len(self.header) - 2)
        lines = ["| " + " | ".join(cells) + " |" for cells in [self.header, rule, *self.rows]]
        return "\n".join([f"## {self.title}", "", *lines, ""])


@dataclass(frozen=True)
class Record:
    """One benchmark on one backbone.

    Attributes:
        name: of the benchmark.
        machine: what it ran on, as it was before.
        plan: how long each comparison was measured.
        rows: what came out.
    """

    name: str
    backbone: str
    machine: dict[str, Any]
    plan: Plan
    rows: Sequence[Row]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Record":
        """Parse what ``asdict`` made of a record."""
        rows = [Row(**row | {"ratio": Ratio(**row["ratio"])}) for row in value["rows"]]
        return cls(**value | {"plan": Plan(**value["plan"]), "rows": rows})

    def table(self) -> Table:
        """Return the rows with a column for each of their further numbers."""
        extra = list(dict.fromkeys(name for row in self.rows for name in row.extra))
        header = ["case", "variant", "ms/image", "images/s", "ratio", "quartiles", *extra, "rounds"]
        return Table(f"{TITLES[self.name]} ({self.backbone})", header, [_cells(row, extra) for row in self.rows])


def merged(records: Sequence[Record], new: Record) -> list[Record]:
    """Put ``new`` in the place of the same benchmark on the same backbone; benchmarks in the order of `TITLES`."""
    kept = [record for record in records if (record.name, record.backbone) != (new.name, new.backbone)]
    return sorted([*kept, new], key=lambda record: list(TITLES).index(record.name))


def read(folder: Path) -> list[Record]:
    """Return the records in ``folder``; none where there is no file.

    Raises:
        UsageError: the file is not one of records.
    """
    path = folder / "results.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, list):
            raise TypeError(f"{path} holds no list")
        return [Record.from_dict(value) for value in values]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} does not hold results that can be added to: name another --output") from error


def save(folder: Path, records: Sequence[Record], command: str = "gpt-serve bench") -> None:
    """Write ``results.json`` and ``tables.md`` into ``folder``, which is made if need be.

    Raises:
        UsageError: the disk refuses.
    """
    text = json.dumps([asdict(record) for record in records], indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("results.json", text + "\n"), ("tables.md", markdown(records, command))):
            with replacing(folder / name) as path:
                path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to: {error.strerror}; choose another --output") from error


def markdown(records: Sequence[Record], command: str = "gpt-serve bench") -> str:
    """Return machine, targets, and a table for each record."""
    tables = [record.table() for record in records]
    reached = summary(records)
    lines = ["# Results", "", f"Written by `{command}`; [how to read this](../README.md).", "", *_machine(records), ""]
    return "\n".join([*lines, *(table.markdown() for table in ([reached] if reached.rows else []) + tables)])


def summary(records: Sequence[Record]) -> Table:
    """Return the figures that the engine should reach, and whether it does."""
    rows = [cells for record in records for cells in targets(record.rows, record.machine["device"])]
    header = ["figure", "measured on", "target", "median", "quartiles", "met"]
    return Table("Targets", header, sorted(rows, key=lambda row: int(row[0].partition(".")[0])))


def machine_facts(device: str) -> dict[str, Any]:
    """Return what decides the times, and nothing that tells one machine from another of its kind."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    for name in ("gpt-serve", "torch", "timm", "litserve", "peft"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:  # peft is optional
            continue
    return facts | {"onnxruntime": ort.__version__}  # of several packages


def _machine(records: Sequence[Record]) -> list[str]:
    """Say once what all records share; where they differ, each value."""
    lines = []
    for name in dict.fromkeys(name for record in records for name in record.machine):
        values = dict.fromkeys(str(record.machine[name]) for record in records if name in record.machine)
        if name == "load_before":
            values = dict.fromkeys((min(values, key=float), max(values, key=float)))
        text = (" to " if name == "load_before" else ", ").join(values)
        lines.append(f"- {name.replace('_', ' ')}: {text}")
    return lines


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cells(row: Row, extra: Sequence[str]) -> list[str]:
    more = [f"{row.extra[name]:.2f}" if name in row.extra else "" for name in extra]
    quartiles = f"{row.ratio.q1:.2f}-{row.ratio.q3:.2f}"
    times = [f"{1000 * row.seconds:.2f}", f"{1 / row.seconds:.1f}", f"{row.ratio.median:.2f}", quartiles]
    return [row.case, row.variant, *times, *more, str(row.rounds)]
