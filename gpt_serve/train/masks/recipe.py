"""How a segmentation adapter is trained."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from gpt_serve.errors import UsageError
from gpt_serve.specs import BackboneSpec, CropMode, Preprocess, Tap
from gpt_serve.train.masks.modules import setr_taps, spread_taps
from gpt_serve.train.methods.prompts import find_method
from gpt_serve.train.recipes.recipe import Recipe

HeadName = Literal["linear", "setr-pup"]

PAPER_ITERATIONS, PAPER_BATCH, PAPER_PICTURES = 160_000, 16, 20_210  # of ADE20K
PAPER_EPOCHS = round(PAPER_ITERATIONS * PAPER_BATCH / PAPER_PICTURES)


@dataclass(frozen=True)
class MaskRecipe(Recipe):
    """A `Recipe` for masks; the defaults are the recipe named ``masks``.

    Attributes:
        taps: what the head reads: ``spread`` for four blocks from the middle to the end, ``last``, or the numbers of
            blocks, from 0.
        head: a linear classifier on each patch, or a SETR-PUP decoder, which reads one block.
        geometry: how images are covered by inputs: ``squash``, ``pad`` or ``windows``.
        ignore: values of label files that belong to no class; None for what the data set says.
        window: with ``windows``, the share of the scaled image's shorter side that one input covers.
        select: ``accuracy`` stands for mIoU on validation images.
    """

    prompt_init: Any = None
    taps: str = "spread"
    norm: Any = "standard"
    epochs: int = 10
    warmup: int = 1
    schedule: Any = "step"
    lr: float = 0.02
    head_lr_scale: float = 0.1
    head_init: Any = "lda"
    head: HeadName = "linear"
    geometry: CropMode = "windows"
    window: float = 0.7
    ignore: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if find_method(self.method).full:
            raise UsageError("--method full: segmentation is for adapters: choose another method")
        super().__post_init__()
        if not 0.05 <= self.window <= 1:
            raise UsageError(f"--window must lie between 0.05 and 1, not {self.window}")
        if self.first_block == "auto":
            raise UsageError("--first-block auto is for classification: name a block, from 0")
        if self.head == "setr-pup" and (self.head_init == "lda" or self.norm != "pretrained"):
            raise UsageError("--head setr-pup starts at random and has norms of its own: leave --head-init, --norm out")


_SETR = {"head": "setr-pup", "norm": "pretrained", "head_init": "small", "taps": "last"}
MASK_RECIPES = {
    "masks": MaskRecipe(),
    # Zheng et al. 2021 as Yoo et al. 2023 use it: SGD, a poly schedule, decoder and heads at ten times the rate.
    "paper": MaskRecipe(
        prompts=100,
        gate_init=10.0,
        epochs=PAPER_EPOCHS,
        warmup=0,
        schedule="poly",
        lr=0.001,
        min_lr=1e-4,
        head_lr_scale=10.0,
        batch_size=PAPER_BATCH,
        optimizer="sgd",
        weight_decay=0.0,
        window=1.0,
        norm="pretrained",
        head_init="small",
        head="setr-pup",
        taps="last",
    ),
}


def choose_mask_recipe(name: str, **overrides: Any) -> tuple[MaskRecipe, str]:
    """The recipe of a run, ``auto`` for ``masks``, and a line that says where it came from.

    Raises:
        UsageError: a setting that cannot work, or a recipe that is not for masks.
    """
    name = "masks" if name == "auto" else name
    if name not in MASK_RECIPES:
        raise UsageError(f"--recipe {name} is for classification: for masks choose {' or '.join(MASK_RECIPES)}")
    given = {key: value for key, value in overrides.items() if value is not None}
    if unknown := sorted(set(given) - {field.name for field in fields(MaskRecipe)}):
        raise UsageError(f"--{unknown[0].replace('_', '-')} is for classification: leave it out")
    if given.get("head") == "setr-pup" and name == "masks":
        given = _SETR | {"head_lr_scale": 1.0, "lr": 0.002} | given
    method = find_method(given.get("method", MASK_RECIPES[name].method))
    if name == "masks" and not method.learns and "augment" not in given:
        given = {"augment": "none"} | given  # then what the frozen backbone gives is computed once
    if "epochs" in given:
        given.setdefault("warmup", given["epochs"] // 10)
    recipe = replace(MASK_RECIPES[name], **given)
    iterations = (
        f": {PAPER_ITERATIONS:,} iterations of batches of {PAPER_BATCH} over ADE20K's {PAPER_PICTURES:,} pictures"
    )
    return recipe, f"recipe {name}" + (f"{iterations} are {PAPER_EPOCHS} epochs" if name == "paper" else "")


def mask_taps(recipe: MaskRecipe, spec: BackboneSpec) -> tuple[Tap, ...]:
    """What the head reads, and the auxiliary heads behind it.

    Raises:
        UsageError: no such block, the same twice, or several for a decoder.
    """
    decodes, depth = recipe.head == "setr-pup", spec.depth
    if decodes and recipe.taps in ("last", "spread"):
        return setr_taps(depth)
    if recipe.taps == "spread":
        return spread_taps(depth)
    text = str(depth - 1) if recipe.taps == "last" else recipe.taps
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise UsageError(f"--taps {text}: for masks use last, spread, or numbers of blocks such as 5,8,11")
    blocks = [int(part) for part in text.split(",")]
    if len(set(blocks)) < len(blocks) or max(blocks) >= depth:
        raise UsageError(f"--taps {text}: name each block once, from 0 to {depth - 1}")
    if decodes and len(blocks) > 1:
        raise UsageError(f"--taps {text}: a SETR-PUP decoder reads one block")
    return tuple(Tap(block, "raw" if decodes else "grid") for block in blocks)


def covered(preprocess: Preprocess, recipe: MaskRecipe) -> Preprocess:
    """The backbone's preprocessing with the recipe's geometry, which loses no border."""
    return replace(
        preprocess, crop_mode=recipe.geometry, crop_pct=recipe.window if recipe.geometry == "windows" else 1.0
    )
