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
        """Normalised images (B, 3, h, w) to probabilities (B, C)."""
        model = self.backbone.model
        features = prompted_features(model, embed(model, images), self.tensors)
        return torch.addmm(self.head_bias, features, self.head_weight.T).softmax(dim=1)


def in_arrival_order(module: TaskModel, adapters: Sequence[Adapter], images: Tensor) -> Tensor:
    """One pass per request, its adapter loaded before."""
    answers = []
    for adapter, image in zip(adapters, images, strict=True):
        module.load(adapter)
        answers.append(module(image[None]))
    return torch.cat(answers)


def grouped(module: TaskModel, adapters: Sequence[Adapter], images: Tensor) -> Tensor:
    """One pass per task, its adapter loaded before."""
    answers: list[Tensor] = [images] * len(adapters)
    for adapter, members in _members(adapters):
        module.load(adapter)
        for index, answer in zip(members, module(images[members]), strict=True):
            answers[index] = answer
    return torch.stack(answers)


def each_its_own(models: Sequence[TaskModel], adapters: Sequence[Adapter], images: Tensor) -> Tensor:
    """One pass per task, on a model with weights of its own; with fewer models than tasks they take turns."""
    answers: list[Tensor] = [images] * len(adapters)
    for place, (_, members) in enumerate(_members(adapters)):
        for index, answer in zip(members, models[place % len(models)](images[members]), strict=True):
            answers[index] = answer
    return torch.stack(answers)


def separate_models(backbone: Backbone, adapters: Sequence[Adapter], most_bytes: int, each: int) -> list[TaskModel]:
    """A model with its own copy of the weights for as many of the adapters as ``most_bytes`` allow, at least one."""
    count = max(1, min(len(adapters), most_bytes // each))
    copies = [Backbone(copy.deepcopy(backbone.model), backbone.spec, str(backbone.device)) for _ in range(count)]
    return [TaskModel(model, adapter) for model, adapter in zip(copies, adapters, strict=False)]


def _members(adapters: Sequence[Adapter]) -> list[tuple[Adapter, list[int]]]:
    """The tasks of a batch in order of arrival, with the places of their images."""
    places: dict[str, tuple[Adapter, list[int]]] = {}
    for index, adapter in enumerate(adapters):
        places.setdefault(adapter.task, (adapter, []))[1].append(index)
    return list(places.values())
