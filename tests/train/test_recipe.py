import math

import pytest

from gpt_serve.errors import UsageError
from gpt_serve.train.recipe import RECIPES, Recipe, learning_rate, make_recipe


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
