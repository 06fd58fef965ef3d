"""What training of masks starts from: prompts, norm and head as the patches of training pictures have them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.views import ordered_batches
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import Reporter, TrainingJob
from gpt_serve.train.loop import EVAL_BATCH, features_of
from gpt_serve.train.masks.modules import MaskModule
from gpt_serve.train.masks.samples import NOTHING
from gpt_serve.train.masks.views import MaskView
from gpt_serve.train.methods.heads import lda_head
from gpt_serve.train.methods.start import MOST_FEATURES, start_prompts


def start_masks(
    backbone: Backbone, module: MaskModule, job: TrainingJob, view: MaskView, inputs: Inputs, reporter: Reporter
) -> None:
    """Set what the recipe takes from the training pictures: first prompts, then the norm, then the head.

    Raises:
        UsageError: there are fewer tokens than prompts.
    """
    recipe = job.recipe
    # Of the same view what frozen blocks give is kept for training.
    plain = view if view.augment == "none" else view.drawn("none")
    if module.prompt is not None and recipe.initialisation != "random":
        start_prompts(backbone, module.prompt, module.first_block, job, plain, reporter)
    if module.head_norm is None:
        return
    taps = max(1, len(module.taps))
    patches = module.grid[0] * module.grid[1]
    some = plain.thinned(2 * MOST_FEATURES // taps // patches)
    features = torch.cat(
        list(features_of(backbone, module, some, inputs, reporter.scanning(len(some), "fitting the head")))
    )
    rows = features.flatten(0, 1)
    if recipe.norm == "standard":
        module.head_norm.set_standard([rows])
    if recipe.head_init == "lda":
        targets = torch.cat(list(patch_ids(some, module.grid))).flatten()
        _fit_head(module, rows, targets, MOST_FEATURES // taps, recipe.seed)


def _fit_head(module: MaskModule, rows: Tensor, targets: Tensor, most: int, seed: int) -> None:
    """Discriminant analysis of patches (n, K*D) that belong to a class, of at most ``most``."""
    known = (targets != NOTHING).nonzero()[:, 0]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:most]
    chosen = known[order]
    seen = module.seen(rows[chosen]).cpu()
    weight, bias = lda_head(seen[None], targets[chosen].long(), module.head.out_features)
    with torch.no_grad():
        module.head.weight.copy_(weight)
        module.head.bias.copy_(bias)


def patch_ids(view: MaskView, grid: tuple[int, int]) -> Iterator[Tensor]:
    """The most frequent id of each patch, (B, gh * gw), batch by batch; `NOTHING` counts as one."""
    for batch in ordered_batches(len(view), EVAL_BATCH):
        ids = view.labels_of(torch.tensor(batch))
        count, height, width = ids.shape
        patches = ids.view(count, grid[0], height // grid[0], grid[1], width // grid[1]).transpose(2, 3)
        yield patches.reshape(count, grid[0] * grid[1], -1).mode(dim=-1).values
