"""What training starts from: prompts, the norm and the head as the training images have them.

Prompts may start from the task's own tokens (Self-Prompt Tuning, Wang et al., ICML 2024). Prompts of block 0 take rows
of the patch embedding, without position embedding or norm; those of block ``i`` take patch tokens as block ``i - 1`` of
the unprompted frozen model hands them on. Images stream through: what is kept does not grow with their number.

Shapes: images ``B``, patch tokens ``N`` of each, width ``D``, prompts ``P``, layers ``R`` (1, or one for each block).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.prompted import block, embed
from gpt_serve.specs import Preprocess
from gpt_serve.train.data.views import View, ordered_batches, thinned
from gpt_serve.train.inputs import Inputs, normalized
from gpt_serve.train.job import Reporter, TrainingJob
from gpt_serve.train.loop import features_of
from gpt_serve.train.methods.heads import lda_head
from gpt_serve.train.methods.logistic import logistic_head
from gpt_serve.train.methods.modules import TaskModule
from gpt_serve.train.methods.prompts import AdapterModule, PromptInit
from gpt_serve.train.recipes.recipe import Recipe

MOST_FEATURES = 40_000  # that discriminant analysis takes: they are held at once
AUGMENTED = 3  # augmented views of each image that it takes
BATCH = 64
LEAST_MINI_BATCH = 1024  # tokens, scikit-learn's own default
SHARE = 0.3  # of the training images that mean, max and kmeans read


def start_from_data(
    backbone: Backbone, module: TaskModule, job: TrainingJob, view: View, inputs: Inputs, reporter: Reporter
) -> None:
    """Set what the recipe takes from the training images: first prompts, then the norm, then the head.

    Only the head sees augmented views, beside the images as they are.

    Args:
        view: the training images, as training augments them.
        inputs: what training gives to ``module``.

    Raises:
        UsageError: there are fewer tokens than prompts.
    """
    plain = view.drawn("none")
    if isinstance(module, AdapterModule) and module.prompt is not None and job.recipe.initialisation != "random":
        start_prompts(backbone, module.prompt, module.first_block, job, plain, reporter)
    if job.recipe.head_init == "lda":
        fit_head(backbone, module, job.recipe, [view], inputs, reporter)
    elif module.head_norm is not None and job.recipe.norm == "standard":
        tick = reporter.scanning(len(plain), "standardising features")
        module.head_norm.set_standard(features_of(backbone, module, plain, inputs, tick))


def fit_head(
    backbone: Backbone, module: TaskModule, recipe: Recipe, parts: Sequence[View], inputs: Inputs, reporter: Reporter
) -> tuple[Tensor, Tensor]:
    """Fit the head to each image as it is and, where training augments, to `AUGMENTED` more views of it.

    Args:
        parts: splits of the images, which it takes together.

    Returns:
        What it was fitted to: features as the head sees them, (V, n, D) of ``V`` views, and classes (n,).
    """
    others = 0 if recipe.augment == "none" else min(AUGMENTED, recipe.views or AUGMENTED)
    wider = module.head.in_features // backbone.spec.width
    some = [thinned(part, MOST_FEATURES // (1 + others) // wider // len(parts)) for part in parts]
    first = 0 if recipe.views else recipe.epochs
    # Epochs that training does not come to; of a fixed number of forms the first ones.
    forms = [("none", 0), *((recipe.augment, first + index) for index in range(others))]
    tick = reporter.scanning(sum(map(len, some)) * len(forms), "fitting the head")
    features = [
        [rows for part in some for rows in features_of(backbone, module, part.drawn(augment, epoch), inputs, tick)]
        for augment, epoch in forms
    ]
    if module.head_norm is not None and recipe.norm == "standard":
        module.head_norm.set_standard(features[0])
    seen = torch.stack([module.seen(torch.cat(rows)) for rows in features]).cpu()
    targets = torch.cat([part.targets(range(len(part))) for part in some])
    several = some[0].classes > 0
    weight, bias = logistic_head(seen, targets) if several else lda_head(seen, targets, module.head.out_features)
    with torch.no_grad():
        module.head.weight.copy_(weight)
        module.head.bias.copy_(bias)
    return seen, targets


def start_prompts(
    backbone: Backbone, prompts: nn.Parameter, first_block: int, job: TrainingJob, plain: View, reporter: Reporter
) -> None:
    """Start prompts from the tokens of training images, as the recipe has it; ``plain`` is not augmented.

    Raises:
        UsageError: there are fewer tokens than prompts.
    """
    recipe = job.recipe
    total = images_to_read(len(plain), backbone.model.patch_embed.num_patches, recipe.initialisation, recipe.prompts)
    tokens = prompts_from_tokens(
        backbone,
        plain,
        recipe.initialisation,
        (prompts.shape[0], prompts.shape[1]),
        first_block=first_block,
        seed=recipe.seed,
        workers=job.workers,
        on_image=reporter.scanning(total, "drawing prompts"),
    )
    with torch.no_grad():
        prompts.copy_(tokens)


class TokenPool(Protocol):
    """Takes a stream of tokens, batch by batch, and keeps no more of it than it needs to make prompts."""

    def add(self, tokens: Tensor) -> None:
        """Take the next tokens, (n, D)."""

    def prompts(self) -> Tensor:
        """The prompts (P, D), once all tokens were added."""


class Drawn:
    """Keeps ``P`` of ``total`` tokens, drawn without replacement."""

    def __init__(self, total: int, prompts: int, seed: tuple[int, int]) -> None:
        self.positions = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(total, prompts, replace=False)))
        self.seen = 0
        self.kept: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        here = (self.positions >= self.seen) & (self.positions < self.seen + len(tokens))
        self.kept.append(tokens[(self.positions[here] - self.seen).to(tokens.device)])
        self.seen += len(tokens)

    def prompts(self) -> Tensor:
        return torch.cat(self.kept)


class Windows:
    """Takes the means or maxima of windows of consecutive tokens and keeps ``P`` of them, drawn at random.

    The last window may be shorter than the others.
    """

    def __init__(self, total: int, prompts: int, seed: tuple[int, int], *, largest: bool = False) -> None:
        self.size = window_size(total, prompts)
        count = math.ceil(total / self.size)
        self.chosen = torch.from_numpy(np.random.default_rng(seed).choice(count, prompts, replace=False))
        self.largest = largest
        self.done: list[Tensor] = []
        self.open: Tensor | None = None  # (D,): sum or maximum of the window that has begun
        self.filled = 0  # tokens in it

    def add(self, tokens: Tensor) -> None:
        tokens = tokens.double()  # a window may span the tokens of many images
        while len(tokens):
            part, tokens = tokens.tensor_split([self.size - self.filled])
            value = part.amax(0) if self.largest else part.sum(0)
            if self.open is not None:
                value = torch.maximum(self.open, value) if self.largest else self.open + value
            self.open, self.filled = value, self.filled + len(part)
            if self.filled == self.size:
                self._close()

    def _close(self) -> None:
        assert self.open is not None
        self.done.append(self.open if self.largest else self.open / self.filled)
        self.open, self.filled = None, 0

    def prompts(self) -> Tensor:
        if self.filled:
            self._close()
        return torch.stack(self.done)[self.chosen.to(self.done[0].device)].float()


class Centres:
    """Clusters tokens by mini-batch k-means and keeps the ``P`` centres.

    The first mini-batch, of at least 1,024 tokens and at least 3 ``P``, places them.
    """

    def __init__(self, total: int, prompts: int, seed: tuple[int, int]) -> None:
        from sklearn.cluster import MiniBatchKMeans

        self.least = max(LEAST_MINI_BATCH, 3 * prompts)
        self.left = total
        self.waiting: list[Tensor] = []
        state = int(np.random.default_rng(seed).integers(2**31))
        self.kmeans: Any = MiniBatchKMeans(prompts, random_state=state, n_init=1)  # type: ignore[no-untyped-call]

    def add(self, tokens: Tensor) -> None:
        self.waiting.append(tokens.float().cpu())
        self.left -= len(tokens)
        # The last tokens join the mini-batch before them when they are too few for one of their own.
        if self.left == 0 or (sum(map(len, self.waiting)) >= self.least and self.left >= self.least):
            self.kmeans.partial_fit(torch.cat(self.waiting).numpy())
            self.waiting = []

    def prompts(self) -> Tensor:
        return torch.from_numpy(self.kmeans.cluster_centers_).float()


POOLS: dict[PromptInit, Callable[[int, int, tuple[int, int]], TokenPool]] = {
    "tokens": Drawn,
    "kmeans": Centres,
    "mean": Windows,
    "max": lambda total, prompts, seed: Windows(total, prompts, seed, largest=True),
}


def window_size(total: int, prompts: int) -> int:
    """How many consecutive tokens make a window: ``total // (P - 1)``, which makes at least ``P`` with the remainder.

    Without a remainder that leaves ``P - 1``; then, and for a single prompt, it is ``total // P``.
    """
    size = total // max(1, prompts - 1)
    return size if math.ceil(total / size) >= prompts else total // prompts


def prompts_from_tokens(
    backbone: Backbone,
    view: View,
    init: PromptInit,
    shape: tuple[int, int],
    *,
    first_block: int = 0,
    seed: int,
    workers: int,
    on_image: Callable[[], object] = lambda: None,
) -> Tensor:
    """Make initial prompts (R, P, D) from the patch tokens of images of ``view``; ``seed`` decides which.

    Args:
        view: the training images, not augmented.
        init: ``tokens`` draws them from the tokens of ``P`` images, ``kmeans`` takes the centres and ``mean`` and
            ``max`` pool windows of the tokens of 30 % of the images (of more, when these have too few tokens).
        shape: (R, P).
        first_block: the block that the prompts enter.
        on_image: called after each image that is read.

    Raises:
        UsageError: all images together have fewer than ``P`` tokens.
    """
    layers, prompts = shape
    each = backbone.model.patch_embed.num_patches
    chosen = _choose(len(view), each, init, prompts, seed)
    total = len(chosen) * each
    pools = [POOLS[init](total, prompts, (seed, layer)) for layer in range(layers)]
    batches = [[chosen[index] for index in batch] for batch in ordered_batches(len(chosen), BATCH)]
    for images, _ in view.batches(batches, workers):
        entering = islice(patch_tokens(backbone, images, view.preprocess), first_block, None)
        for pool, tokens in zip(pools, entering, strict=False):
            pool.add(tokens.flatten(0, 1))
        for _ in images:
            on_image()
    return torch.stack([pool.prompts() for pool in pools])


def images_to_read(count: int, each: int, init: PromptInit, prompts: int) -> int:
    """How many of ``count`` images with ``each`` tokens `prompts_from_tokens` reads."""
    wanted = prompts if init == "tokens" else math.ceil(SHARE * count)
    return min(count, max(wanted, math.ceil(prompts / each)))


def _choose(count: int, each: int, init: PromptInit, prompts: int, seed: int) -> list[int]:
    """Indices of the images that are read, in random order."""
    if count * each < prompts:
        what = "fewer tokens than k-means has centres" if init == "kmeans" else "fewer tokens than that to draw from"
        raise UsageError(
            f"--prompts {prompts}: the {count} training images have {count * each} patch tokens, {what}; "
            "choose fewer prompts, or --prompt-init random"
        )
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order[: images_to_read(count, each, init, prompts)]


@torch.no_grad()
def patch_tokens(backbone: Backbone, images: Tensor, preprocess: Preprocess) -> Iterator[Tensor]:
    """Yield the patch tokens (B, N, D) that enter each block, without the prefix: first the raw patch embedding.

    Args:
        images: uint8 (B, 3, H, W).
        preprocess: how the task normalises them.
    """
    model, images = backbone.model, normalized(images.to(backbone.device), preprocess)
    yield model.patch_embed(images)
    x = embed(model, images)
    for blk in model.blocks[:-1]:
        x = block(blk, x, None, None)
        yield x[:, model.num_prefix_tokens :]
