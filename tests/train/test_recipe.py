import math
from pathlib import Path
from typing import get_args

import click
import pytest

from gpt_serve.cli.train import train
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.loop import Trainer
from gpt_serve.train.methods.prompts import METHODS, GateKind, HeadInit, PromptInit
from gpt_serve.train.methods.start import POOLS
from gpt_serve.train.recipes.recipe import RECIPES, Recipe, learning_rate, make_recipe
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


def test_the_papers_recipe() -> None:
    """Yoo et al. and their code: one rate for everything, no decay, prompts dropped at the input."""
    recipe = RECIPES["paper"]
    assert (recipe.method, recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("gated", "sgd", 0.9, 0.0)
    assert (recipe.head_weight_decay, recipe.head_lr_scale, recipe.head_init) == (None, 1.0, "kaiming")
    assert (recipe.epochs, recipe.warmup, recipe.schedule, recipe.min_lr) == (100, 10, "epoch", 0.0)
    assert (recipe.prompt_dropout, recipe.norm, recipe.augment) == (0.1, "pretrained", "crop-flip")


def test_the_recipe_of_self_prompt_tuning() -> None:
    """Wang et al.'s code, MAE on CUB."""
    recipe = RECIPES["spt"]
    assert (recipe.method, recipe.prompts, recipe.initialisation) == ("spt-deep", 20, "tokens")
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.head_weight_decay) == ("adamw", 0.05, 0.01, 0.5)
    assert (recipe.epochs, recipe.warmup, recipe.schedule, recipe.min_lr) == (100, 10, "step", 1e-8)
    assert (recipe.batch_size, recipe.head_lr_scale, recipe.head_init, recipe.prompt_dropout) == (32, 1.0, "small", 0.0)


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


def test_the_lda_recipe_is_for_adapters() -> None:
    recipe = make_recipe("lda")
    assert (recipe.method, recipe.initialisation, recipe.norm, recipe.head_init) == (
        "gated",
        "tokens",
        "standard",
        "lda",
    )
    assert (recipe.prompts, recipe.epochs, recipe.warmup, recipe.batch_size) == (10, 20, 2, 16)
    assert (recipe.select, make_recipe("adamw").select) == ("loss", "accuracy")
    for lr in (0.05, 0.005, 0.3):
        assert make_recipe("lda", lr=lr).head_lr_scale * lr == pytest.approx(0.002)
    assert make_recipe("lda", lr=0.01, head_lr_scale=3.0).head_lr_scale == 3
    random_head = make_recipe("lda", head_init="small")
    assert random_head.head_lr_scale * random_head.lr == pytest.approx(0.02) == RECIPES["adamw"].head_lr_scale * 0.01
    linear = make_recipe("lda", method="linear")
    assert (linear.initialisation, linear.lr, linear.head_lr_scale) == ("random", 0.002, 1)
    assert make_recipe("lda", method="linear", lr=0.1).head_lr_scale == 1
    assert make_recipe("lda", method="vpt-deep").initialisation == "tokens"
    with pytest.raises(UsageError, match="--recipe lda is for adapters: .* --recipe full --head-init lda"):
        make_recipe("lda", method="full")


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


# Of every step: five epochs of three, the first two of them warm-up, up to a rate of 1.
BY_EPOCH = [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 0.75, 0.75, 0.75, 0.25, 0.25, 0.25]
BY_STEP = [k / 6 for k in range(6)] + [1.0, 0.96985, 0.88302, 0.75, 0.58682, 0.41318, 0.25, 0.11698, 0.03015]


@pytest.mark.parametrize("batch_size", [4, 5])
@pytest.mark.parametrize(
    ("name", "expected", "head"),
    [("lda", BY_STEP, 0.002), ("adamw", BY_EPOCH, 2), ("paper", BY_EPOCH, 1), ("spt", BY_STEP, 1)],
)
def test_every_step_has_the_rate_of_its_recipe(
    tiny: Backbone, colours: Path, name: str, expected: list[float], head: float, batch_size: int
) -> None:
    """As vectors that were written down, whatever the batch; the head's own decay beside."""
    settings = {"prompts": 2, "prompt_init": "random", "epochs": 5, "warmup": 2, "lr": 1.0, "batch_size": batch_size}
    recipe = make_recipe(name, **settings)
    view = View(open_dataset(str(colours), 0).train[:12], PREPROCESS, None, "none", 0)
    trainer = Trainer(
        tiny, build_module(tiny, recipe, 3), recipe, train=view, val=view, world=World(), inputs=Inputs(0)
    )
    rates: list[list[float]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    trainer.fit(lambda *_: None, lambda _: None)
    assert [rate for _, rate in rates] == pytest.approx(expected, abs=1e-5)
    assert [rate for rate, _ in rates] == pytest.approx([head * rate for rate in expected], abs=1e-5)
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == {"lda": [0.01, 0.01], "adamw": [0.01, 0.01], "paper": [0.0, 0.0], "spt": [0.5, 0.01]}[name]
