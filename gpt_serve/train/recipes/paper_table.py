"""Table 5 of the paper as data: what it trained each task with, by the family of the backbone."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gpt_serve.specs import Family

FAMILY_NAMES: dict[Family, str] = {"mae": "MAE", "mocov3": "MoCo v3"}


@dataclass(frozen=True)
class PaperRow:
    """A task's settings for one family of backbones.

    Attributes:
        task: the task's name here; aliases lead to it.
        printed: its name in the paper's table.
        gate_init: ``G``; gate priors start at ``-G``.
    """

    task: str
    printed: str
    family: Family
    batch_size: int
    prompts: int
    lr: float
    gate_init: float

    def settings(self) -> dict[str, Any]:
        """The values that the row gives to the fields of a `Recipe`."""
        return {name: getattr(self, name) for name in ("batch_size", "prompts", "lr", "gate_init")}

    def __str__(self) -> str:
        values = f"batch size {self.batch_size}, prompts {self.prompts}, lr {self.lr:g}, gate init {self.gate_init:g}"
        return f"{self.printed}, {FAMILY_NAMES[self.family]}: {values}"


def find_row(task: str, family: Family) -> PaperRow | None:
    """The row of ``task``, by its name or an alias of it; None when the table has none."""
    tasks, names = _table()
    name = names.get(_plain(task))
    if name is None:
        return None
    entry = tasks[name]
    batch_size, prompts, lr, gate_init = entry[family]
    return PaperRow(name, entry["printed"], family, batch_size, prompts, float(lr), float(gate_init))


def find_task(name: str) -> tuple[str, str] | None:
    """The task's name here and the benchmark that it belongs to; None when the table has no such task or alias."""
    tasks, names = _table()
    task = names.get(_plain(name))
    return None if task is None else (task, tasks[task]["benchmark"])


def table_tasks() -> list[str]:
    """The tasks of the table, in its order."""
    return list(_table()[0])


def selected_values(column: str) -> list[float]:
    """The different values of one field of `PaperRow` over all tasks and both families, in ascending order."""
    rows = [find_row(task, family) for task in table_tasks() for family in FAMILY_NAMES]
    return sorted({getattr(row, column) for row in rows})


def _plain(task: str) -> str:
    """Case and punctuation do not tell names apart."""
    return re.sub(r"[^a-z0-9]", "", task.lower())


@cache
def _table() -> tuple[dict[str, Any], dict[str, str]]:
    """The tasks, and which of them each plain name means."""
    text = (files("gpt_serve.train.recipes") / "paper_table.toml").read_text(encoding="utf-8")
    tasks: dict[str, Any] = tomllib.loads(text)["tasks"]
    names = {_plain(alias): task for task, entry in tasks.items() for alias in (task, *entry["aliases"])}
    return tasks, names
