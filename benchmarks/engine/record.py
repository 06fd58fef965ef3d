"""What was measured, part by part: kept as JSON, merged with what other runs measured, written as tables."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from targets import targets

from gpt_serve.bench.report import Report, Table, machine_facts
from gpt_serve.bench.timing import Plan, Ratio, Row

COMMAND = "python benchmarks/engine/run.py"


@dataclass(frozen=True)
class Record:
    """One part on one backbone.

    Attributes:
        name: of the part; its rows have their own name of a benchmark, as a rule the same.
        machine: as it was before the part.
        minutes: that the part took.
    """

    name: str
    backbone: str
    machine: dict[str, Any]
    plan: Plan
    minutes: float
    rows: tuple[Row, ...]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Record":
        """What ``asdict`` made of it."""
        rows = tuple(Row(**row | {"ratio": Ratio(**row["ratio"])}) for row in value["rows"])
        return cls(**value | {"plan": Plan(**value["plan"]), "rows": rows})


def merged(records: Sequence[Record], new: Record, order: Sequence[str]) -> list[Record]:
    """``records`` with ``new`` in the place of the same part on the same backbone; parts in ``order``."""
    kept = [record for record in records if (record.name, record.backbone) != (new.name, new.backbone)]
    return sorted([*kept, new], key=lambda record: order.index(record.name))


def read(folder: Path) -> list[Record]:
    """Of ``results.json``; none when there is no file."""
    path = folder / "results.json"
    return [Record.from_dict(value) for value in json.loads(path.read_text())] if path.exists() else []


def save(folder: Path, records: Sequence[Record]) -> None:
    """``results.json`` and ``tables.md``."""
    (folder / "results.json").write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    (folder / "tables.md").write_text(markdown(records))


def tables(record: Record) -> list[Table]:
    """Of one part on one backbone."""
    return Report(record.machine, record.plan, record.rows).tables()


def markdown(records: Sequence[Record]) -> str:
    """Machine, targets, and a table for each part and backbone."""
    lines = ["# Results", "", f"Written by `{COMMAND}`; [how to read this](../README.md).", ""]
    lines += _machine(records)
    lines += [summary(records).markdown()]
    return "\n".join([*lines, *(table.markdown() for record in records for table in tables(record))])


def summary(records: Sequence[Record]) -> Table:
    """The figures that the engine should reach, and whether it does."""
    rows = []
    for record in records:
        rows += targets(record.rows, record.machine["device"])
    header = ["figure", "measured on", "target", "median", "quartiles", "met"]
    return Table("Targets", header, sorted(rows, key=lambda row: int(row[0].partition(".")[0])))


def _machine(records: Sequence[Record]) -> list[str]:
    """What all records share is said once; where they differ, each value."""
    names = dict.fromkeys(name for record in records for name in record.machine)
    lines = []
    for name in names:
        values = dict.fromkeys(str(record.machine.get(name, "")) for record in records)
        text = ", ".join(values)
        if name == "load_before":
            text = f"{min(values, key=float)} to {max(values, key=float)}"
        lines.append(f"- {name.replace('_', ' ')}: {text}")
    minutes = sum(record.minutes for record in records)
    return [*lines, f"- minutes: {minutes:.0f}", ""]


def facts(device: str) -> dict[str, Any]:
    """The machine, with PEFT's version where it is installed."""
    try:
        return machine_facts(device) | {"peft": version("peft")}
    except PackageNotFoundError:
        return machine_facts(device)
