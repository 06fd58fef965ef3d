"""Gated prompt tuning as the papers' authors write it: a yardstick, never used to serve.

One task a batch. Every block runs on ``[CLS, prompts, patches]``; scores, softmax and mixing are separate products;
the temperatures are clamped in every forward pass; prompts are cut out and put back around each gate; the last block
computes every row, and under CLS pooling the norm takes all of them. Equations of Yoo et al., ICML 2023.

Shapes: batch ``B``, blocks ``L``, width ``D``, heads ``H`` of size ``d``, prompts ``P``, ``S = 1 + P + N``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.model.backbone import Backbone


class AuthorsModel(nn.Module):
    """Turns normalised images (B, 3, h, w) into probabilities (B, C).

    Args:
        backbone: with a CLS token and no register tokens; its modules are shared, not copied.
        adapter: with ``prompt`` (1, P, D), ``gamma`` (L-1,) and ``tau`` (L,).
    """

    def __init__(self, backbone: Backbone, adapter: Adapter) -> None:
        super().__init__()
        assert adapter.prompt is not None and adapter.gamma is not None and adapter.tau is not None
        self.vit: Any = backbone.timm_model
        self.pool = adapter.pool
        self.prompt_embeddings = nn.Parameter(adapter.prompt)
        self.gate_priors = nn.Parameter(adapter.gamma)
        self.temperatures = nn.Parameter(adapter.tau.clone())
        self.head = nn.Linear(adapter.head_weight.shape[1], adapter.head_weight.shape[0])
        self.head.weight.data, self.head.bias.data = adapter.head_weight, adapter.head_bias
        self.requires_grad_(False)
        self.to(backbone.device, next(backbone.timm_model.parameters()).dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Run Algorithm 1 of the paper."""
        vit, count = self.vit, self.prompt_embeddings.shape[1]
        self.temperatures.data.clamp_(0.01, 10.0)
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        prompts = self.prompt_embeddings.expand(len(images), -1, -1)
        x = torch.cat((tokens[:, :1], prompts, tokens[:, 1:]), dim=1)
        last = len(vit.blocks) - 1
        for index, block in enumerate(vit.blocks):
            x = self._block(block, x, self.temperatures[index])
            if index < last:
                gate = torch.sigmoid(self.gate_priors[index])
                prompts = gate * x[:, 1 : 1 + count] + (1 - gate) * prompts
                x = torch.cat((x[:, :1], prompts, x[:, 1 + count :]), dim=1)
        features = self._norm(x)[:, 0] if self.pool == "cls" else self._norm(x[:, 1:].mean(dim=1))
        probabilities: Tensor = self.head(features).softmax(dim=-1)
        return probabilities

    def _norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self.vit.fc_norm(self.vit.norm(x))  # timm has one of them, the other is the identity
        return normed

    def _block(self, block: Any, x: Tensor, tau: Tensor) -> Tensor:
        """Compute Eq. 2: (B, S, D) -> (B, S, D)."""
        x = x + block.ls1(self._attention(block.attn, block.norm1(x), tau))
        y: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
        return y

    def _attention(self, layer: Any, x: Tensor, tau: Tensor) -> Tensor:
        """Compute Eqs. 3 and 9 with the scale of the authors' code: softmax(q k^T / (sqrt(d) tau)) v."""
        batch, rows, width = x.shape
        qkv = layer.qkv(x).reshape(batch, rows, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q @ k.transpose(-2, -1)) * layer.head_dim**-0.5 / tau
        mixed = scores.softmax(dim=-1) @ v
        projected: Tensor = layer.proj(mixed.transpose(1, 2).reshape(batch, rows, width))
        return projected
