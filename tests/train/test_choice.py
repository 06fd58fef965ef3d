"""The recipe that a run takes, and what it says about it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpt_serve.cli.main import main
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import TINY
from gpt_serve.specs import Family
from gpt_serve.train.recipes.choice import choose_recipe
from gpt_serve.train.recipes.paper_table import find_row, table_tasks
from gpt_serve.train.recipes.recipe import RECIPES
from tests.tiny_vit import PREPROCESS, tiny_vit


def backbone(family: Family | None, name: str = "vit_base_patch16_224") -> Backbone:
    return Backbone.from_model(tiny_vit(depth=1), name, PREPROCESS, "mean", family=family)


@pytest.mark.parametrize("family", ["mae", "mocov3"])
@pytest.mark.parametrize("name", ["auto", "paper"])
def test_every_task_of_the_table_takes_its_row(name: str, family: Family) -> None:
    model = backbone(family)
    for task in table_tasks():
        recipe, text = choose_recipe(name, task, model)
        row = find_row(task, family)
        assert row is not None
        assert recipe == dataclasses.replace(RECIPES["paper"], **row.settings())
        assert text == f"recipe paper with Table 5's row {row}"


@pytest.mark.parametrize(
    ("name", "task", "family", "method", "expected", "text"),
    [
        ("auto", "mine", "mae", None, "lda", "recipe lda (Table 5 has no row for task 'mine' on vit_base"),
        ("auto", "cub", None, None, "lda", "recipe lda (Table 5 has no row for task 'cub' on vit_base"),
        ("auto", "cub", "mae", "gated-deep", "adamw", "recipe adamw"),
        ("auto", "cub", None, "linear", "adamw", "recipe adamw"),
        ("auto", "mine", "mae", "spt-deep", "spt", "recipe spt (Wang et al., MAE on CUB)"),
        ("auto", "cub", None, "spt-deep", "adamw", "recipe adamw"),
        ("adamw", "cub", "mae", None, "adamw", "recipe adamw"),
        ("paper", "mine", "mae", None, "paper", "recipe paper without a row of Table 5 (it has no task 'mine')"),
        ("paper", "cub", None, None, "paper", "recipe paper without a row of Table 5 (the backbone is neither MAE nor"),
        ("spt", "cub", "mae", None, "spt", "recipe spt"),
    ],
)
def test_what_no_row_decides(
    name: str, task: str, family: Family | None, method: str | None, expected: str, text: str
) -> None:
    recipe, said = choose_recipe(name, task, backbone(family), method=method)
    assert recipe == dataclasses.replace(RECIPES[expected], method=method or RECIPES[expected].method)
    assert said.startswith(text)


def test_the_bundled_backbone_keeps_its_own_default_and_names_the_row() -> None:
    model = backbone("mae", TINY.name)
    recipe, text = choose_recipe("auto", "flowers", model)
    assert recipe == RECIPES["lda"]
    assert text == (
        "recipe lda, the default with mae-vit-tiny-32 (--recipe paper takes Table 5's row Flowers, MAE: "
        "batch size 64, prompts 100, lr 0.1, gate init 15)"
    )
    assert choose_recipe("paper", "flowers", model)[0].gate_init == 15


@pytest.mark.parametrize("override", [{"batch_size": 8}, {"prompts": 3}, {"lr": 0.7}, {"gate_init": 2.0}])
def test_every_flag_overrides_the_row(override: dict[str, Any]) -> None:
    (name, value) = next(iter(override.items()))
    recipe, text = choose_recipe("paper", "cub", backbone("mae"), **override)
    row = find_row("cub", "mae")
    assert row is not None
    assert recipe == dataclasses.replace(RECIPES["paper"], **row.settings() | override)
    assert text.endswith(f"; given instead: {name.replace('_', ' ')} {value:g}")


def test_published_data_have_their_row_whatever_the_task_is_called() -> None:
    recipe, text = choose_recipe("auto", "birds", backbone("mae"), ("fgvc", "cub"))
    expected, row = choose_recipe("auto", "cub", backbone("mae"))
    assert (recipe.lr, recipe.gate_init, recipe.prompts) == (expected.lr, expected.gate_init, expected.prompts)
    assert text == f"{row}; images as for FGVC"
    other, _ = choose_recipe("auto", "cub", backbone("mae"), ("vtab", "dtd"))
    row_of_dtd = find_row("dtd", "mae")
    assert row_of_dtd is not None and other.gate_init == row_of_dtd.gate_init != expected.gate_init


def test_spt_starts_the_head_smaller_with_moco() -> None:
    assert choose_recipe("spt", "cub", backbone("mocov3"))[0].head_init == "tiny"
    assert choose_recipe("spt", "cub", backbone("mocov3"), head_init="small")[0].head_init == "small"
    assert choose_recipe("spt", "cub", backbone("mae"))[0].head_init == "small"


def test_the_spt_recipe_is_the_default_of_its_methods_on_published_backbones() -> None:
    recipe, text = choose_recipe("auto", "cub", backbone("mocov3"), method="spt-shallow", lr=0.1)
    assert text == "recipe spt (Wang et al., MAE on CUB)"
    assert (recipe.prompts, recipe.head_weight_decay, recipe.head_init, recipe.lr) == (100, 0.5, "tiny", 0.1)
    assert choose_recipe("auto", "cub", backbone("mae", TINY.name), method="spt-deep")[1] == "recipe adamw"


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("linear", {"prompts": 50}, "--prompts: the method linear learns no prompts"),
        ("linear", {"gate_init": 3.0}, "--gate-init: the method linear learns no gates"),
        ("vpt-deep", {"gate_init": 3.0}, "--gate-init: the method vpt-deep learns no gates"),
        ("full", {"prompts": 1}, "--prompts: the method full learns no prompts"),
    ],
)
def test_values_for_what_is_not_learned_are_refused(method: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_recipe("auto", "cub", backbone("mae"), method=method, **given)


def test_a_setting_that_cannot_work_is_refused() -> None:
    with pytest.raises(UsageError, match="--lr must be above 0"):
        choose_recipe("auto", "cub", backbone("mae"), lr=-1.0)


def test_train_prints_what_it_took(tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Backbone.from_model(tiny_vit(), "vit_base_patch16_224", PREPROCESS, "mean", family="mae")
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: model)
    command = ["train", "--task", "oxford-flowers", "--data", str(colours), "--device", "cpu", "--epochs", "1"]
    command += ["--prompts", "2", "--batch-size", "32", "--prompt-init", "mean", "--no-temperature", "--gate", "hard"]
    result = CliRunner(catch_exceptions=False).invoke(main, [*command, "--adapters", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == (
        "recipe paper with Table 5's row Flowers, MAE: batch size 64, prompts 100, lr 0.1, gate init 15; "
        "given instead: batch size 32, prompts 2"
    )
    card = (tmp_path / "oxford-flowers" / "README.md").read_text()
    for line in ("| gate | hard |", "| gate_init | 15.0 |", "| temperature | False |", "| prompt_init | mean |"):
        assert line in card
