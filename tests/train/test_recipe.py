import math
from pathlib import Path
from typing import get_args

import click
import pytest

from gpt_serve.backbone import Backbone
from gpt_serve.errors import UsageError
from gpt_serve.train.data import open_dataset
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module
from gpt_serve.train.loop import Trainer
from gpt_serve.train.methods import METHODS, GateKind, HeadInit, PromptInit
from gpt_serve.train.prompt_init import POOLS
from gpt_serve.train.recipe import RECIPES, Recipe, learning_rate, make_recipe
from gpt_serve.train.views import View
from gpt_serve.train_commands import train
from tests.tiny_vit import PREPROCESS


def test_the_schedule_warms_up_from_zero_then_follows_half_a_cosine() -> None:
    recipe = Recipe(epochs=10, warmup=2, lr=1.0)
    expected = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [learning_rate(recipe, epoch) for epoch in range(10)] == pytest.approx(expected)


def test_the_paper_schedule_peaks_after_ten_of_a_hundred_epochs() -> None:
    rates = [learning_rate(RECIPES["paper"], epoch) for epoch in range(100)]
    assert rates[0] == 0
    assert rates[10] == max(rates) == 0.25
    assert rates[55] == pytest.approx(0.125)
    assert 0 < rates[99] < 1e-3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"epochs": 0}, "--epochs must lie between"),
        ({"batch_size": 0}, "--batch-size must lie between"),
        ({"prompts": 0}, "--prompts must lie between"),
        ({"prompt_dropout": 1.0}, "--prompt-dropout must lie between"),
        ({"seed": -1}, "--seed must lie between"),
        ({"epochs": 5, "warmup": 5}, "--warmup 5 leaves nothing"),
        ({"min_lr": 0.02}, "--min-lr must lie between 0 and --lr 0.01"),
        ({"head_weight_decay": 11.0}, "--head-weight-decay must lie between"),
        ({"method": "lora"}, "unknown method 'lora': choose one of gated"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag(setting: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**setting)  # type: ignore[arg-type]


def test_overrides_replace_what_is_given_and_warm_up_follows_the_epochs() -> None:
    assert make_recipe("paper", lr=None, epochs=None) == RECIPES["paper"]
    recipe = make_recipe("paper", lr=0.5, epochs=20)
    assert (recipe.lr, recipe.epochs, recipe.warmup, recipe.optimizer) == (0.5, 20, 2, "sgd")
    assert make_recipe("paper", epochs=20, warmup=0).warmup == 0


def test_the_schedule_of_steps_falls_to_its_last_rate_within_an_epoch() -> None:
    recipe = RECIPES["spt"]
    assert learning_rate(recipe, 0.5) == pytest.approx(0.05 * 0.05)
    assert learning_rate(recipe, 10.0) == 0.05
    assert learning_rate(recipe, 55.5) == pytest.approx(
        1e-8 + (0.05 - 1e-8) * 0.5 * (1 + math.cos(math.pi * 45.5 / 90))
    )
    assert learning_rate(recipe, 100.0) == pytest.approx(1e-8)


@pytest.mark.parametrize(
    ("method", "prompts"), [(None, 20), ("spt-deep", 20), ("gated-deep", 20), ("spt-shallow", 100), ("gated", 100)]
)
def test_the_spt_recipe_has_20_deep_or_100_shallow_prompts(method: str | None, prompts: int) -> None:
    recipe = make_recipe("spt", method=method)
    assert (recipe.method, recipe.prompts) == (method or "spt-deep", prompts)
    assert make_recipe("spt", method=method, prompts=7).prompts == 7
    assert (recipe.weight_decay, recipe.head_weight_decay, recipe.prompt_dropout) == (0.01, 0.5, 0.0)


def test_a_stored_recipe_is_read_again() -> None:
    for recipe in (*RECIPES.values(), Recipe(method="linear"), Recipe(temperature=False, gate="hard")):
        again = Recipe(**recipe.to_dict())
        assert again.to_dict() == recipe.to_dict()


def test_the_command_line_offers_every_method_and_initialisation() -> None:
    choices = {option.name: option.type.choices for option in train.params if isinstance(option.type, click.Choice)}
    assert list(choices["method"]) == list(METHODS)
    assert list(choices["prompt_init"]) == list(get_args(PromptInit)) == ["random", *POOLS]
    assert list(choices["head_init"]) == list(get_args(HeadInit))
    assert list(choices["gate"]) == list(get_args(GateKind))


def test_each_step_has_its_rate_and_the_head_its_own_decay(tiny: Backbone, colours: Path) -> None:
    recipe = make_recipe("spt", prompts=2, prompt_init="random", epochs=3, warmup=1, batch_size=6)
    view = View(open_dataset(str(colours), 0).train[:15], PREPROCESS, None, "none", 0)
    trainer = Trainer(tiny, build_module(tiny, recipe, 3), recipe, train=view, val=view, world=World(), workers=0)
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[1]["lr"]))
    trainer.fit(lambda *_: None, lambda _: None)
    assert rates == [learning_rate(recipe, epoch + step / 3) for epoch in range(3) for step in range(3)]
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5, 0.01]
