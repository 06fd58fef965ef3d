"""Hyperparameters and the learning-rate schedule."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gpt_serve.errors import UsageError
from gpt_serve.train.methods import HeadInit, find_method

Augment = Literal["crop-flip", "crop", "none"]
Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained; the defaults are the recipe named ``adamw``.

    Attributes:
        method: a name of `METHODS`.
        prompts: prompt tokens ``P`` (per block for deep prompts).
        gate_init: gamma starts at ``-gate_init``.
        prompt_dropout: dropout on the prompt tokens at the input.
        epochs: passes over the training images.
        warmup: epochs of linear warm-up; with any, epoch 0 runs at learning rate 0, as the authors' does.
        lr: peak learning rate of prompts, gates and temperatures; not scaled with the batch.
        head_lr_scale: the head's learning rate as a multiple of ``lr``.
        batch_size: images per step, over all processes.
        optimizer: SGD with momentum, or AdamW.
        momentum: of SGD.
        weight_decay: on everything that is trained.
        head_init: of the head's weight, see `AdapterModule`.
        augment: random crop and horizontal flip, crop only, or the evaluation transform.
        seed: of initialisation, order, augmentation, dropout and the validation split.
    """

    method: str = "gated"
    prompts: int = 10
    gate_init: float = 1.0
    prompt_dropout: float = 0.1
    epochs: int = 20
    warmup: int = 2
    lr: float = 0.01
    head_lr_scale: float = 2.0
    batch_size: int = 16
    optimizer: Optimizer = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    head_init: HeadInit = "small"
    augment: Augment = "crop-flip"
    seed: int = 0

    def __post_init__(self) -> None:
        find_method(self.method)
        limits: list[tuple[str, float, float]] = [
            ("prompts", 1, 4096),
            ("epochs", 1, 100_000),
            ("warmup", 0, 100_000),
            ("batch_size", 1, 65_536),
            ("prompt_dropout", 0.0, 0.99),
            ("momentum", 0.0, 0.9999),
            ("weight_decay", 0.0, 10.0),
            ("gate_init", -100.0, 100.0),
            ("head_lr_scale", 0.001, 1000.0),
            ("seed", 0, 2**31 - 1),
        ]
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must lie between {low} and {high}, not {getattr(self, name)}")
        if not 0 < self.lr <= 1e4:
            raise UsageError(f"--lr must be above 0, not {self.lr}")
        if self.warmup >= self.epochs and self.epochs > 1:
            raise UsageError(f"--warmup {self.warmup} leaves nothing of --epochs {self.epochs}: choose fewer")

    def to_dict(self) -> dict[str, Any]:
        """The hyperparameters as stored in the adapter's metadata."""
        return asdict(self)


RECIPES = {
    "adamw": Recipe(),
    # Yoo et al., Table 5: 100 prompts, batch 64 and the middle of the rates and gate priors of FGVC with MAE.
    "paper": Recipe(
        prompts=100,
        gate_init=5.0,
        epochs=100,
        warmup=10,
        lr=0.25,
        batch_size=64,
        head_lr_scale=1.0,
        optimizer="sgd",
        weight_decay=0.0,
        head_init="kaiming",
    ),
}


def make_recipe(name: str, **overrides: Any) -> Recipe:
    """The named recipe with every override that is not None; warm-up follows ``epochs`` unless it is given.

    Raises:
        UsageError: a setting that cannot work.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if "epochs" in given:
        given.setdefault("warmup", given["epochs"] // 10)
    return replace(RECIPES[name], **given)


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Learning rate of ``epoch`` (from 0): linear warm-up from 0, then half a cosine to 0, stepped per epoch."""
    if epoch < recipe.warmup:
        return recipe.lr * epoch / recipe.warmup
    progress = (epoch - recipe.warmup) / max(1, recipe.epochs - recipe.warmup)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
