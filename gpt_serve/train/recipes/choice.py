"""Which recipe a run takes: by its name, or by task and backbone."""

from typing import Any, Protocol

from gpt_serve.errors import UsageError
from gpt_serve.model.catalog import BUNDLED
from gpt_serve.specs import Family
from gpt_serve.train.data.datasets import Benchmark
from gpt_serve.train.methods.prompts import find_method
from gpt_serve.train.recipes.paper_table import PaperRow, find_row
from gpt_serve.train.recipes.recipe import PROTOCOLS, Recipe, make_recipe


class Pretrained(Protocol):
    """What the choice depends on: a `Backbone`, or what is known of one that another process has loaded."""

    @property
    def name(self) -> str:
        """Its timm name or bundled name."""

    @property
    def family(self) -> Family | None:
        """Its pretraining, where published recipes know it."""


def choose_recipe(
    name: str, task: str, backbone: Pretrained, published: tuple[Benchmark, str] | None = None, **overrides: Any
) -> tuple[Recipe, str]:
    """Choose the recipe of a run; returns it and a line that says where it came from.

    ``paper`` takes the row of Table 5 for the task and the backbone's family, and values from the middle of the table
    where there is none. ``auto`` takes that row for the method ``gated``, or ``lda`` where there is none and on a
    bundled backbone, where it measured better; the SPT methods get ``spt`` on other MAE and MoCo v3 backbones, full
    fine-tuning ``full`` and every other method ``adamw``.

    Args:
        name: ``auto`` or a name of `RECIPES`.
        published: the benchmark that the data belong to, whose preprocessing, augmentation and protocol apply with any
            recipe, and the task's name there, which the row is found by whatever ``task`` is called.
        overrides: fields of the recipe; None for those that are not given.

    Raises:
        UsageError: a setting that cannot work, or one of something that the method does not learn.
    """
    task = published[1] if published else task
    row = None if backbone.family is None else find_row(task, backbone.family)
    if name == "auto":
        name = _of_method(overrides.get("method"), row, backbone)
        why = _why_not(row, task, backbone) if name == "lda" else ""
    elif name == "paper" and row is None:
        known = "the backbone is neither MAE nor MoCo v3" if backbone.family is None else f"it has no task {task!r}"
        why = f" without a row of Table 5 ({known})"
    else:
        why = ""
    defaults: dict[str, Any] = {}
    if name == "paper" and row is not None:
        defaults, why = row.settings(), _taken(row, overrides)
    elif name == "spt":
        defaults = {"head_init": "tiny"} if backbone.family == "mocov3" else {}
        why = " (Wang et al., MAE on CUB)"
    if published is not None:
        defaults |= PROTOCOLS[published[0]]
        why += f"; images as for {published[0].upper()}"
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = make_recipe(name, **defaults | given)
    method = find_method(recipe.method)
    for field, what, learned in (("prompts", "prompts", method.prompts), ("gate_init", "gates", method.gated)):
        if field in given and not learned:
            flag = field.replace("_", "-")
            raise UsageError(f"--{flag}: the method {recipe.method} learns no {what}: leave it out")
    return recipe, f"recipe {name}{why}"


def _of_method(method: str | None, row: PaperRow | None, backbone: Pretrained) -> str:
    """The name of the recipe that ``auto`` stands for."""
    published = backbone.name not in BUNDLED
    if method in (None, "gated"):
        return "paper" if published and row is not None else "lda"
    if method in ("spt-shallow", "spt-deep") and published and backbone.family is not None:
        return "spt"
    return "full" if method == "full" else "adamw"


def _why_not(row: PaperRow | None, task: str, backbone: Pretrained) -> str:
    """Why ``auto`` took the recipe ``lda``, in words that follow its name."""
    if row is None:
        return f" (Table 5 has no row for task {task!r} on {backbone.name})"
    return f", the default with {backbone.name} (--recipe paper takes Table 5's row {row})"


def _taken(row: PaperRow, overrides: dict[str, Any]) -> str:
    given = [f"{key.replace('_', ' ')} {overrides[key]:g}" for key in row.settings() if overrides.get(key) is not None]
    return f" with Table 5's row {row}" + (f"; given instead: {', '.join(given)}" if given else "")
