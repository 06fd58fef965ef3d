"""What was measured, where, as tables and JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from gpt_serve.bench.timing import Plan, Row
from gpt_serve.errors import UsageError

TITLES = {
    "export": "Exported graphs: a naive export against torch and the folded ones",
    "forward": "Forward pass: timm's own against the prompted one",
    "mixed": "Batches: one task against many, through the engine",
    "engines": "Engines: torch against onnxruntime",
    "http": "Server: the engine alone against saturated HTTP",
    "peers": "Peers: the engine against other ways to serve many tasks",
    "tasks": "Tasks in a batch: one against many",
    "prompts": "Prompts: timm's own forward pass against the engine's",
    "bank": "Bank: all adapters resident against 100 of them",
    "cold": "Cold adapters: an answer from a resident adapter against one from disk",
    "overhead": "Overhead: the forward pass on ready tensors against the engine",
    "passes": "Passes: how large, and for which rows together",
    "soak": "Soak: memory of the process under churn",
}


@dataclass(frozen=True)
class Table:
    """One benchmark on one backbone, as text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """A heading and a table; numbers are aligned to the right."""
        rule = ["---", "---"] + ["---:"] * (len(self.header) - 2)
        lines = ["| " + " | ".join(cells) + " |" for cells in [self.header, rule, *self.rows]]
        return "\n".join([f"## {self.title}", "", *lines, ""])


@dataclass(frozen=True)
class Report:
    """A run of the benchmarks.

    Attributes:
        machine: what it ran on.
        plan: how long each comparison was measured.
        rows: what came out; benchmarks and backbones in one piece each.
        command: what ran them.
    """

    machine: dict[str, Any]
    plan: Plan
    rows: Sequence[Row]
    command: str = "gpt-serve bench"

    def tables(self) -> list[Table]:
        """One per benchmark and backbone."""
        groups = groupby(self.rows, key=lambda row: (row.benchmark, row.backbone))
        return [_table(f"{TITLES[benchmark]} ({backbone})", list(rows)) for (benchmark, backbone), rows in groups]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; times in seconds per image."""
        rows = [asdict(row) | {"images_per_second": 1 / row.seconds} for row in self.rows]
        return {"machine": self.machine, "plan": asdict(self.plan), "results": rows}

    def markdown(self) -> str:
        """Machine and tables."""
        facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in self.machine.items()]
        head = ["# Results", "", f"Written by `{self.command}`; [how to read this](../README.md).", "", *facts, ""]
        return "\n".join([*head, *(table.markdown() for table in self.tables())])

    def write(self, folder: Path) -> None:
        """``results.json`` and ``tables.md`` in ``folder``, which exists."""
        for name, text in {"results.json": json.dumps(self.to_dict(), indent=1), "tables.md": self.markdown()}.items():
            try:
                (folder / name).write_text(text.rstrip("\n") + "\n")
            except OSError as error:
                raise UsageError(f"{folder / name} cannot be written: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Before the measurements rather than after; `UsageError` when the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror}; choose another --output") from error


def machine_facts(device: str) -> dict[str, Any]:
    """What decides the times, and nothing that tells one machine from another of its kind."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    versions = {name: version(name) for name in ("gpt-serve", "torch", "timm", "litserve")}
    return facts | versions | {"onnxruntime": ort.__version__}  # of several packages


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _table(title: str, rows: Sequence[Row]) -> Table:
    extra = list(dict.fromkeys(name for row in rows for name in row.extra))
    header = ["case", "variant", "ms/image", "images/s", "ratio", "quartiles", *extra, "rounds"]
    return Table(title, header, [_cells(row, extra) for row in rows])


def _cells(row: Row, extra: Sequence[str]) -> list[str]:
    more = [f"{row.extra[name]:.2f}" if name in row.extra else "" for name in extra]
    ratio = row.ratio
    return [
        row.case,
        row.variant,
        f"{1000 * row.seconds:.2f}",
        f"{1 / row.seconds:.1f}",
        f"{ratio.median:.2f}",
        f"{ratio.q1:.2f}-{ratio.q3:.2f}",
        *more,
        str(row.rounds),
    ]
