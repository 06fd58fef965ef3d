"""Which recipe a run takes: by its name, or by task and backbone."""

from typing import Any

from gpt_serve.backbone import BUNDLED, Backbone
from gpt_serve.train.data import Benchmark
from gpt_serve.train.paper_table import Row, find_row
from gpt_serve.train.recipe import PROTOCOLS, Recipe, make_recipe


def choose_recipe(
    name: str, task: str, backbone: Backbone, benchmark: Benchmark | None = None, **overrides: Any
) -> tuple[Recipe, str]:
    """The recipe of a run, and a line that says where it came from.

    ``paper`` takes the row of Table 5 for the task and the backbone's family, and values from the middle of the table
    where there is none. ``auto`` takes that row for gated prompts, except on the bundled backbone, where ``adamw``
    measured better; full fine-tuning gets ``full`` and everything else ``adamw``.

    Args:
        name: ``auto`` or a name of `RECIPES`.
        benchmark: that the data belong to; its preprocessing, augmentation and protocol apply with any recipe.
        overrides: fields of the recipe; None for those that are not given.

    Raises:
        UsageError: a setting that cannot work.
    """
    row = None if backbone.family is None else find_row(task, backbone.family)
    if name == "auto":
        published = row is not None and backbone.name != BUNDLED and overrides.get("method") in (None, "gated")
        full = overrides.get("method") == "full"
        name = "full" if full else "paper" if published else "adamw"
        why = _why_not(row, task, backbone) if name == "adamw" else ""
    elif name == "paper" and row is None:
        known = "the backbone is neither MAE nor MoCo v3" if backbone.family is None else f"it has no task {task!r}"
        why = f" without a row of Table 5 ({known})"
    else:
        why = ""
    defaults: dict[str, Any] = {}
    if name == "paper" and row is not None:
        defaults, why = row.settings(), _taken(row, overrides)
    elif name == "spt" and backbone.family == "mocov3":
        defaults = {"head_init": "tiny"}
    if benchmark is not None:
        defaults |= PROTOCOLS[benchmark]
        why += f"; images as for {benchmark.upper()}"
    given = {key: value for key, value in overrides.items() if value is not None}
    return make_recipe(name, **defaults | given), f"recipe {name}{why}"


def _why_not(row: Row | None, task: str, backbone: Backbone) -> str:
    """What follows ``recipe adamw`` when nothing else was asked for."""
    if row is None:
        return f" (Table 5 has no row for task {task!r} on {backbone.name})"
    return f", the default with {backbone.name} (--recipe paper takes Table 5's row {row})"


def _taken(row: Row, overrides: dict[str, Any]) -> str:
    given = [f"{key.replace('_', ' ')} {overrides[key]:g}" for key in row.settings() if overrides.get(key) is not None]
    return f" with Table 5's row {row}" + (f"; given instead: {', '.join(given)}" if given else "")
