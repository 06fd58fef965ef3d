"""Serving without mixing: adapters swapped into one module, or a whole model for each task.

Both compute with the project's own forward pass, so that only the form of serving differs.

Shapes: batch ``B``, classes ``C``, width ``D``.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import embed, prompted_features


class TaskModel:
    """A backbone with one adapter at a time.

    Args:
        backbone: shared with whoever else has it.
        adapter: what the module holds first.
    """

    def __init__(self, backbone: Backbone, adapter: Adapter) -> None:
        self.backbone = backbone
        self.load(adapter)

    def load(self, adapter: Adapter) -> None:
        """Put the adapter's tensors, which lie in host memory, in the place of those before."""
        device = self.backbone.device
        self.tensors = AdapterBatch.of(adapter, self.backbone.spec, device)
        self.head_weight = adapter.head_weight.to(device, copy=True)
        self.head_bias = adapter.head_bias.to(device, copy=True)

    def __call__(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, h, w) into probabilities (B, C)."""
        model = self.backbone.model
        features = prompted_features(model, embed(model, images), self.tensors)
        return torch.addmm(self.head_bias, features, self.head_weight.T).softmax(dim=1)


def in_arrival_order(module: TaskModel, adapters: Sequence[Adapter], images: Tensor) -> Tensor:
    """Compute one pass per request, its adapter loaded before."""
    return torch.cat([grouped([module], [adapter], images[row : row + 1]) for row, adapter in enumerate(adapters)])


def grouped(models: Sequence[TaskModel], adapters: Sequence[Adapter], images: Tensor) -> Tensor:
    """Compute one pass per task: on the only model, which loads the adapter before, or on one of several in turns."""
    answers: list[Tensor] = [images] * len(adapters)
    for place, task in enumerate(dict.fromkeys(adapter.task for adapter in adapters)):
        rows = [row for row, adapter in enumerate(adapters) if adapter.task == task]
        model = models[place % len(models)]
        if len(models) == 1:
            model.load(adapters[rows[0]])
        for row, result in zip(rows, model(images[rows]), strict=True):
            answers[row] = result
    return torch.stack(answers)


def separate_models(backbone: Backbone, adapters: Sequence[Adapter], most_bytes: int) -> list[TaskModel]:
    """Copy the weights for as many of the adapters as ``most_bytes`` allow, two or more."""
    count = max(2, min(len(adapters), most_bytes // weight_bytes(backbone)))
    copies = [Backbone(copy.deepcopy(backbone.model), backbone.spec, str(backbone.device)) for _ in range(count)]
    return [TaskModel(model, adapter) for model, adapter in zip(copies, adapters, strict=False)]


def weight_bytes(backbone: Backbone) -> int:
    """Return the size of the backbone's weights as they are."""
    return sum(weight.numel() * weight.element_size() for weight in backbone.model.parameters())
