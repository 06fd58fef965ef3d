"""A gated model as the paper's authors write it: a yardstick, never used to serve.

One task; every block runs on ``[CLS, prompts, patches]``, prompts are cut out and put back around the gate.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.model.backbone import Backbone


class PlainGated(nn.Module):
    """Normalised images (B, 3, h, w) to probabilities (B, C); shallow prompts with gates and temperatures.

    Args:
        backbone: with a CLS token and no register tokens.
        adapter: with ``prompt`` (1, P, D), ``gamma`` (L-1,) and ``tau`` (L,).
    """

    def __init__(self, backbone: Backbone, adapter: Adapter) -> None:
        super().__init__()
        assert adapter.prompt is not None and adapter.gamma is not None and adapter.tau is not None
        self.model: Any = backbone.timm_model
        self.pool = adapter.pool
        self.prompt = nn.Parameter(adapter.prompt, requires_grad=False)
        self.gamma = nn.Parameter(adapter.gamma, requires_grad=False)
        self.tau = nn.Parameter(adapter.tau, requires_grad=False)
        self.head = nn.Linear(*adapter.head_weight.T.shape)
        self.head.weight.data, self.head.bias.data = adapter.head_weight, adapter.head_bias
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Algorithm 1 of Yoo et al., ICML 2023."""
        tokens = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))
        prompts = self.prompt.expand(images.shape[0], -1, -1)
        count = prompts.shape[1]
        x = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
        for index, blk in enumerate(self.model.blocks):
            before = x[:, 1 : 1 + count]
            x = x + blk.ls1(self._attention(blk.attn, blk.norm1(x), index))
            x = x + blk.ls2(blk.mlp(blk.norm2(x)))
            if index < len(self.model.blocks) - 1:
                gate = torch.sigmoid(self.gamma[index])
                prompts = gate * x[:, 1 : 1 + count] + (1 - gate) * before
                x = torch.cat([x[:, :1], prompts, x[:, 1 + count :]], dim=1)
        pooled = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(dim=1)
        logits: Tensor = self.head(self.model.fc_norm(self.model.norm(pooled)))
        return logits.softmax(dim=-1)

    def _attention(self, attn: Any, x: Tensor, index: int) -> Tensor:
        batch, rows, width = x.shape
        qkv = attn.qkv(x).reshape(batch, rows, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(q / self.tau[index].clamp(0.01, 10.0), k, v)
        projected: Tensor = attn.proj(mixed.transpose(1, 2).reshape(batch, rows, width))
        return projected
