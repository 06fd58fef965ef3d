"""What training starts from: prompts, the norm and the head as the training images have them."""

import torch
from torch import nn

from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.views import View, thinned
from gpt_serve.train.job import Job, Reporter
from gpt_serve.train.loop import features_of
from gpt_serve.train.methods.discriminant import lda_head
from gpt_serve.train.methods.modules import TaskModule
from gpt_serve.train.methods.prompt_init import images_to_read, prompts_from_tokens
from gpt_serve.train.methods.prompts import AdapterModule

MOST_FEATURES = 40_000  # that discriminant analysis takes: they are held at once
AUGMENTED = 3  # augmented views of each image that it takes


def start_from_data(backbone: Backbone, module: TaskModule, job: Job, view: View, reporter: Reporter) -> None:
    """Set what the recipe takes from the training images: prompts and what is standard, not augmented, then the head.

    Raises:
        UsageError: there are fewer tokens than prompts.
    """
    plain = view.drawn("none")
    prompts = module.prompt if isinstance(module, AdapterModule) else None
    if prompts is not None and job.recipe.initialisation != "random":
        _start_prompts(backbone, prompts, job, plain, reporter)
    if job.recipe.head_init == "lda":
        _start_head(backbone, module, job, view, reporter)
    elif module.head_norm is not None and job.recipe.norm == "standard":
        tick = reporter.scanning(len(plain), "standardising features")
        module.head_norm.set_standard(features_of(backbone, module, plain, job.workers, tick))


def _start_head(backbone: Backbone, module: TaskModule, job: Job, view: View, reporter: Reporter) -> None:
    """By each image as it is and, where training augments, by as many others of its views as `AUGMENTED`."""
    recipe = job.recipe
    others = 0 if recipe.augment == "none" else AUGMENTED
    some = thinned(view, MOST_FEATURES // (1 + others))
    # Epochs that training does not come to.
    views = [some.drawn("none"), *(some.drawn(recipe.augment, recipe.epochs + index) for index in range(others))]
    tick = reporter.scanning(len(some) * len(views), "fitting the head")
    features = [list(features_of(backbone, module, each, job.workers, tick)) for each in views]
    if module.head_norm is not None and recipe.norm == "standard":
        module.head_norm.set_standard(features[0])
    seen = torch.stack([module.seen(torch.cat(rows)) for rows in features]).cpu()
    targets = torch.tensor([sample.target for sample in some.samples])
    weight, bias = lda_head(seen, targets, module.head.out_features)
    with torch.no_grad():
        module.head.weight.copy_(weight)
        module.head.bias.copy_(bias)


def _start_prompts(backbone: Backbone, prompts: nn.Parameter, job: Job, plain: View, reporter: Reporter) -> None:
    recipe = job.recipe
    total = images_to_read(len(plain), backbone.model.patch_embed.num_patches, recipe.initialisation, recipe.prompts)
    tokens = prompts_from_tokens(
        backbone,
        plain,
        recipe.initialisation,
        (prompts.shape[0], prompts.shape[1]),
        first_block=recipe.first_block,
        seed=recipe.seed,
        workers=job.workers,
        on_image=reporter.scanning(total, "drawing prompts"),
    )
    with torch.no_grad():
        prompts.copy_(tokens)
