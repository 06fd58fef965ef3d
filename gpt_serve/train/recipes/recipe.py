"""Hyperparameters and the learning-rate schedule."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gpt_serve.errors import UsageError
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.datasets import Benchmark
from gpt_serve.train.methods.heads import HeadInit, Norm
from gpt_serve.train.methods.prompts import GateKind, PromptInit, find_method

Augment = Literal["crop-flip", "crop", "none"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["epoch", "step", "poly"]
Select = Literal["accuracy", "loss"]
Preparation = Literal["backbone", "fgvc", "vtab"]
FirstBlock = int | Literal["auto"]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained; the defaults are the recipe named ``adamw``.

    Attributes:
        method: a name of `METHODS`.
        prompts: prompt tokens ``P`` (per block for deep prompts).
        prompt_init: how they start, see `AdapterModule` and `prompts_from_tokens`; None for the method's own choice.
        gate: soft gates, or hard ones of 0 or 1.
        gate_init: gamma starts at ``-gate_init``.
        temperature: whether attention temperatures are learned; None for the method's own choice.
        prompt_dropout: dropout on the prompt tokens at the input.
        first_block: the block that prompts enter, from 0; ``auto`` for what validation images prefer.
        taps: what the head reads: ``last`` for the last block with the backbone's pooling, ``auto`` for what validation
            images prefer, or blocks with a pooling, see `parse_taps`.
        norm: before the head the backbone's own, a fresh, frozen one as VPT has it for MAE, or the backbone's own and
            features standardised over the training images.
        epochs: passes over the training images.
        warmup: epochs of linear warm-up; with any, epoch 0 runs at learning rate 0, as the authors' does.
        schedule: whether the learning rate is set before each epoch or before each step; ``poly`` is before each step,
            and falls as a polynomial of power 0.9 instead of as a cosine.
        lr: peak learning rate of prompts, gates and temperatures; not scaled with the batch.
        min_lr: what the learning rate falls to.
        head_lr_scale: the head's learning rate as a multiple of ``lr``.
        batch_size: images per step, over all processes.
        optimizer: SGD with momentum, or AdamW.
        momentum: of SGD.
        weight_decay: on everything that is trained.
        head_weight_decay: on the head instead; None for the same.
        head_init: of the head, see `make_head` and `lda_head`.
        augment: random crop and horizontal flip, crop only, or the evaluation transform.
        views: how many augmented images there are of each, which epochs take in turn, so that what frozen blocks give
            for them can be kept; 0 for new ones every epoch.
        preprocess: the backbone's own evaluation transform, or that of a benchmark, see `prepared`.
        select: what the best epoch is best in, on validation images; the other breaks ties.
        final_fit: train on validation images as well and publish the last epoch, instead of selecting the best.
        refit: after the best epoch is chosen, fit the head once more, to training and validation images together.
        seed: of initialisation, order, augmentation, dropout and the validation split.
    """

    method: str = "gated"
    prompts: int = 10
    prompt_init: PromptInit | None = None
    gate: GateKind = "soft"
    gate_init: float = 1.0
    temperature: bool | None = None
    prompt_dropout: float = 0.1
    first_block: FirstBlock = 0
    taps: str = "last"
    norm: Norm = "pretrained"
    epochs: int = 20
    warmup: int = 2
    schedule: Schedule = "epoch"
    lr: float = 0.01
    min_lr: float = 0.0
    head_lr_scale: float = 2.0
    batch_size: int = 16
    optimizer: Optimizer = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    head_weight_decay: float | None = None
    head_init: HeadInit = "small"
    augment: Augment = "crop-flip"
    views: int = 0
    preprocess: Preparation = "backbone"
    select: Select = "accuracy"
    final_fit: bool = False
    refit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        method = find_method(self.method)
        if self.gate == "hard" and not method.gated:
            raise UsageError(f"--gate hard: the method {self.method} learns no gates: leave it out")
        if self.prompt_init not in (None, "random") and not method.prompts:
            raise UsageError(f"--prompt-init {self.prompt_init}: the method {self.method} has no prompts: leave it out")
        if self.first_block and not method.prompts:
            raise UsageError(f"--first-block {self.first_block}: the method {self.method} has no prompts: leave it out")
        if self.refit and (self.head_init != "lda" or self.final_fit):
            raise UsageError("--refit goes with --head-init lda and without --final-fit: leave it out")
        if method.full and (self.norm != "pretrained" or self.tempered or self.taps != "last"):
            raise UsageError("--method full: leave --norm, --taps and --temperature out, the whole backbone is trained")
        limits: list[tuple[str, float, float]] = [
            ("prompts", 1, 4096),
            ("views", 0, 10_000),
            ("epochs", 0 if self.head_init == "lda" else 1, 100_000),
            ("warmup", 0, 100_000),
            ("batch_size", 1, 65_536),
            ("prompt_dropout", 0.0, 0.99),
            ("momentum", 0.0, 0.9999),
            ("weight_decay", 0.0, 10.0),
            ("gate_init", -100.0, 100.0),
            ("head_lr_scale", 1e-6, 1e6),
            ("seed", 0, 2**31 - 1),
        ]
        if self.first_block != "auto":
            limits.append(("first_block", 0, 9999))
        if self.head_weight_decay is not None:
            limits.append(("head_weight_decay", 0.0, 10.0))
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must lie between {low} and {high}, not {getattr(self, name)}")
        if not 0 < self.lr <= 1e4:
            raise UsageError(f"--lr must be above 0, not {self.lr}")
        if not 0 <= self.min_lr <= self.lr:
            raise UsageError(f"--min-lr must lie between 0 and --lr {self.lr}, not {self.min_lr}")
        if self.warmup >= self.epochs and self.epochs > 1:
            raise UsageError(f"--warmup {self.warmup} leaves nothing of --epochs {self.epochs}: choose fewer")

    @property
    def tempered(self) -> bool:
        """Whether attention temperatures are learned."""
        return find_method(self.method).tempered if self.temperature is None else self.temperature

    @property
    def named_block(self) -> int:
        """The block that prompts enter, as far as the recipe names one; 0 where it is left open."""
        return 0 if self.first_block == "auto" else self.first_block

    @property
    def initialisation(self) -> PromptInit:
        """How prompts start: as the recipe says, or else as its method does."""
        return find_method(self.method).prompt_init if self.prompt_init is None else self.prompt_init

    def to_dict(self) -> dict[str, Any]:
        """The hyperparameters as an adapter's metadata stores them: what is left to the method appears by its value."""
        return asdict(self) | {"temperature": self.tempered, "prompt_init": self.initialisation}


HEAD_RATE = 0.02  # of a random head, by the recipe adamw
LDA_HEAD_RATE = 0.002

RECIPES = {
    "adamw": Recipe(),
    # The default for adapters, by the accuracy study in benchmarks/: what it adds costs nothing to serve. As the head
    # starts where discriminant analysis ends, it has a small rate and the prompts have a large one.
    "lda": Recipe(
        prompt_init="tokens",
        taps="auto",
        norm="standard",
        head_init="lda",
        lr=0.05,
        head_lr_scale=LDA_HEAD_RATE / 0.05,
        schedule="step",
        select="loss",
    ),
    # No gradient at all: taps and head in closed form, from one look at each image.
    "instant": Recipe(
        method="linear",
        taps="auto",
        norm="standard",
        head_init="lda",
        augment="none",
        epochs=0,
        select="loss",
        refit=True,
    ),
    # Full fine-tuning: one small rate for everything.
    "full": Recipe(method="full", lr=3e-4, head_lr_scale=1.0, weight_decay=0.05),
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
    # Wang et al., MAE on CUB, by their code at ce0754f; shallow prompts take SPT_SHALLOW_PROMPTS.
    "spt": Recipe(
        method="spt-deep",
        prompts=20,
        prompt_dropout=0.0,
        epochs=100,
        warmup=10,
        schedule="step",
        lr=0.05,
        min_lr=1e-8,
        batch_size=32,
        head_lr_scale=1.0,
        weight_decay=0.01,
        head_weight_decay=0.5,
    ),
}
SPT_SHALLOW_PROMPTS = 100

# What Jia et al. (Visual Prompt Tuning) do for each benchmark, and the papers after them. VTAB-1K: hyperparameters are
# chosen with 800 images to train and 200 to validate; the numbers are of the last epoch of training on all 1,000.
PROTOCOLS: dict[Benchmark, dict[str, Any]] = {
    "fgvc": {"preprocess": "fgvc", "augment": "crop-flip"},
    "vtab": {"preprocess": "vtab", "augment": "none", "final_fit": True},
}


def make_recipe(name: str, **overrides: Any) -> Recipe:
    """The named recipe, changed by every override that is not None.

    When ``epochs`` is given and ``warmup`` is not, the warm-up takes a tenth of the epochs.

    Raises:
        UsageError: a setting that cannot work.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if name == "lda":
        given = _lda_defaults(given) | given
    if name == "spt" and "method" in given and not find_method(given["method"]).deep:
        given.setdefault("prompts", SPT_SHALLOW_PROMPTS)
    if "epochs" in given:
        given.setdefault("warmup", given["epochs"] // 10)
    return replace(RECIPES[name], **given)


def _lda_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The head keeps its rate whatever that of the prompts is; without prompts, it is what ``lr`` means."""
    method = find_method(given.get("method", "gated"))
    if method.full:
        raise UsageError("--recipe lda is for adapters: with --method full choose --recipe full --head-init lda")
    rate = LDA_HEAD_RATE if given.get("head_init", "lda") == "lda" else HEAD_RATE
    if not method.prompts:
        return {"prompt_init": "random", "lr": rate, "head_lr_scale": 1.0}
    lr = given.get("lr", RECIPES["lda"].lr)
    return {"head_lr_scale": rate / lr} if lr > 0 else {}


def prepared(preprocess: Preprocess, name: Preparation) -> Preprocess:
    """The backbone's preprocessing with the scaling and crop of a benchmark; its normalisation stays as it is.

    ``fgvc`` scales the shorter side to 256 for an input of 224, then crops; ``vtab`` squashes. Both are bilinear.
    """
    if name == "fgvc":
        return replace(preprocess, crop_mode="center", crop_pct=224 / 256, interpolation="bilinear")
    if name == "vtab":
        return replace(preprocess, crop_mode="squash", interpolation="bilinear")
    return preprocess


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Learning rate at ``epoch`` (from 0; with a fraction within one): linear warm-up from 0, then
    half a cosine, or a polynomial."""
    if epoch < recipe.warmup:
        return recipe.lr * epoch / recipe.warmup
    progress = (epoch - recipe.warmup) / max(1, recipe.epochs - recipe.warmup)
    left = (1 - progress) ** 0.9 if recipe.schedule == "poly" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * left
