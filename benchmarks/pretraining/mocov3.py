"""MoCo v3 (Chen et al., 2021) around a timm ViT, of lightly's parts.

It differs from the authors' code in two ways: the heads' last batch norms are affine (lightly's), and views are not
blurred.
"""

import copy

import torch
from augment import contrastive_view
from lightly.models import utils
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.utils.scheduler import cosine_schedule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE = 0.2
MOMENTUM = 0.99
MIN_AREA = 0.2


class MoCoV3(nn.Module):
    """Each view of an image predicts what a slow copy of the network makes of the other view, among the whole batch.

    Position embeddings are fixed sines and cosines, and the patch embedding keeps its random weights, as the paper
    advises for a ViT.

    Attributes:
        vit: the encoder; its CLS token is what is trained.
    """

    family = "mocov3"

    def __init__(self, vit: VisionTransformer, hidden: int = 4096, output: int = 256) -> None:
        super().__init__()
        self.vit = vit
        utils.initialize_2d_sine_cosine_positional_embedding(vit.pos_embed, num_prefix_tokens=vit.num_prefix_tokens)
        utils.deactivate_requires_grad(vit.patch_embed)
        head = MoCoProjectionHead(vit.embed_dim, hidden, output, num_layers=3, batch_norm=True)
        self.base = nn.Sequential(vit, head)
        self.predictor = MoCoProjectionHead(output, hidden, output, num_layers=2, batch_norm=True)
        self.target = copy.deepcopy(self.base)
        utils.deactivate_requires_grad(self.target)

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two views: uint8 (B, 3, H, W) to what `forward` takes."""
        return contrastive_view(images, MIN_AREA, solarize=0.0), contrastive_view(images, MIN_AREA, solarize=0.2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two normalised views (B, 3, H, W) of the same images."""
        with torch.no_grad():
            keys = self.target(first), self.target(second)
        queries = self.predictor(self.base(first)), self.predictor(self.base(second))
        return contrast(queries[0], keys[1]) + contrast(queries[1], keys[0])

    @torch.no_grad()
    def follow(self, done: float) -> None:
        """Move the slow copy towards the network; its momentum rises to 1 as ``done`` does."""
        share = 1000  # steps of the cosine
        utils.update_momentum(self.base, self.target, cosine_schedule(int(share * done), share, MOMENTUM, 1.0))


def contrast(queries: Tensor, keys: Tensor) -> Tensor:
    """InfoNCE of (B, C) queries and keys, in which row ``b`` belongs to row ``b``, times ``2 * TEMPERATURE``."""
    similar = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T
    rows = torch.arange(len(queries), device=queries.device)
    return 2 * TEMPERATURE * F.cross_entropy(similar / TEMPERATURE, rows)
