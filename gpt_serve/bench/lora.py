"""Hugging Face PEFT: LoRA adapters on the same timm model, mixed in a batch through ``adapter_names``.

Needs the extra ``bench``. PEFT routes ``adapter_names`` to its LoRA layers whatever model they sit in; each layer then
runs one small pass for every adapter in the batch. PEFT's own heads per adapter do not work for a ViT (its issue 1960),
so heads are applied here, in one product for the whole batch.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.model.backbone import Backbone

RANK = 8


class LoraModel:
    """A copy of the backbone with a LoRA adapter of random weights for each task; heads are those of ``adapters``.

    Raises:
        ImportError: peft is not installed.
    """

    def __init__(self, backbone: Backbone, adapters: Sequence[Adapter]) -> None:
        from peft import LoraConfig, get_peft_model

        def config() -> LoraConfig:
            # The weights are drawn at random, B included: a zero B would compute the same products.
            return LoraConfig(r=RANK, target_modules=["qkv"], init_lora_weights=False)

        names = [adapter.task for adapter in adapters]
        self.peft = get_peft_model(copy.deepcopy(backbone.timm_model), config(), adapter_name=names[0])
        for name in names[1:]:
            self.peft.add_adapter(name, config())
        self.peft.eval().requires_grad_(False)
        self.peft.to(backbone.device)
        self._places = {name: place for place, name in enumerate(names)}
        self.head_weight = torch.stack([adapter.head_weight for adapter in adapters]).to(backbone.device)
        self.head_bias = torch.stack([adapter.head_bias for adapter in adapters]).to(backbone.device)

    def __call__(self, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """Turn normalised images (B, 3, h, w), one task each, into probabilities (B, C)."""
        features = self.peft(images, adapter_names=list(tasks))
        index = torch.tensor([self._places[task] for task in tasks], device=features.device)
        logits = torch.baddbmm(self.head_bias[index, None], features[:, None], self.head_weight[index].mT)[:, 0]
        return logits.softmax(dim=-1)


def lora_model(backbone: Backbone, adapters: Sequence[Adapter]) -> LoraModel | None:
    """Return None, and print a line that says so, where peft is not installed."""
    try:
        return LoraModel(backbone, adapters)
    except ImportError:
        print("peft is not installed: its rows are left out (pip install 'gpt-serve[bench]')")
        return None


def lora_bytes(backbone: Backbone) -> int:
    """Return the size of one adapter: A (r, D) and B (3D, r) in each block, float32."""
    return 4 * backbone.spec.depth * RANK * 4 * backbone.spec.width
