"""The training loop for masks: the loss is of pixels, and validation by mIoU of whole pictures."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gpt_serve.images.masks import mask, stitched
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.data.views import ordered_batches
from gpt_serve.train.inputs import Batch, Inputs, autocast
from gpt_serve.train.loop import EVAL_BATCH, Score, Trainer, prepared_for
from gpt_serve.train.masks.modules import MaskModule
from gpt_serve.train.masks.samples import NOTHING, Ids
from gpt_serve.train.masks.score import Confusion
from gpt_serve.train.masks.views import MaskView

OnMask = Callable[[int, Ids], object]
"""Is given the number of a picture and its mask (h, w)."""


class MaskTrainer(Trainer):
    """A `Trainer` of a `MaskModule`; what it calls accuracy is that of pixels in training, and mIoU in validation."""

    module: MaskModule
    train_view: MaskView
    val_view: MaskView

    def batch_loss(self, data: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch times its inputs, and the sum of their shares of pixels that are classified right."""
        ids = self.train_view.labels_of(data[1]).to(self.backbone.device)
        loss, logits = _loss(self.backbone, self.module, data, ids, self.train_view)
        scaled = torch.nn.functional.interpolate(logits.detach(), tuple(ids.shape[1:]), mode="bilinear")
        known = ids != NOTHING
        right = ((scaled.argmax(1) == ids) & known).sum() / known.sum().clamp(min=1)
        return loss * len(ids), right * len(ids)

    def _validate(self) -> Score:
        confusion, loss = measure(self.backbone, self.module, self.val_view, self.inputs)
        return Score(confusion.miou, loss)


def _loss(backbone: Backbone, module: MaskModule, data: Batch, ids: Tensor, view: MaskView) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its float32 logits (B, C, y, x)."""
    with autocast(backbone):
        features = module.features(backbone.model, prepared_for(data[0].to(backbone.device), view.preprocess))
        return module.loss(features, ids)


@torch.no_grad()
def measure(
    backbone: Backbone, module: MaskModule, view: MaskView, inputs: Inputs, on_mask: OnMask = lambda number, ids: None
) -> tuple[Confusion, float]:
    """Masks of all pictures of a split, put together from their windows: the counts of pixels, and the mean loss.

    Args:
        view: of windows: not augmented.
        on_mask: told of each mask, in the order of the pictures.
    """
    module.eval()
    confusion = Confusion(module.head.out_features)
    total, waiting = 0.0, []
    for data in inputs.batches(view, ordered_batches(len(view), EVAL_BATCH)):
        ids = view.labels_of(data[1]).to(backbone.device)
        loss, logits = _loss(backbone, module, data, ids, view)
        total += loss.item() * len(ids)
        for place, own in zip(data[1].tolist(), logits.float().cpu().numpy(), strict=True):
            waiting.append(own)
            number = view.places[place].picture
            plan = view.plans[number]
            if len(waiting) == len(plan.windows):
                found = mask(stitched(plan, np.stack(waiting)), plan.size)
                confusion.add(found, view.pictures.read(number)[1])
                on_mask(number, found)
                waiting = []
    return confusion, total / len(view)
