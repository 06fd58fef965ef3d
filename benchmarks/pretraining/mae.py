"""Masked autoencoder (He et al., 2022) around a timm ViT, of lightly's parts.

Shapes: batch ``B``, patches ``N``, sequence ``S = 1 + N``, of which ``K`` rows are kept and ``M = S - K`` masked, width
``D``, patch side ``p``.
"""

from augment import crop_flip_normalize
from lightly.models import utils
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

DECODER_WIDTH, DECODER_HEADS, DECODER_DEPTH = 96, 3, 1
MIN_AREA = 0.6


class MAE(nn.Module):
    """Reconstructs the masked patches of an image from the others.

    The position embeddings of both halves are fixed sines and cosines. CLS is never masked.

    Attributes:
        vit: the encoder, initialised anew.
    """

    family = "mae"

    def __init__(self, vit: VisionTransformer, mask_ratio: float = 0.75) -> None:
        super().__init__()
        self.vit, self.mask_ratio = vit, mask_ratio
        self.patch: int = vit.patch_embed.patch_size[0]
        self.encoder = MaskedVisionTransformerTIMM(vit)
        self.to_decoder = nn.Linear(vit.embed_dim, DECODER_WIDTH)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            vit.patch_embed.num_patches, DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS
        )
        self.to_pixels = nn.Linear(DECODER_WIDTH, 3 * self.patch**2)
        for layer in (self.to_decoder, self.to_pixels):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def views(self, images: Tensor) -> tuple[Tensor]:
        """Augmented: uint8 (B, 3, H, W) to what `forward` takes."""
        return (crop_flip_normalize(images, MIN_AREA),)

    def forward(self, images: Tensor) -> Tensor:
        """The loss of normalised images (B, 3, H, W) under masks drawn at random."""
        size = (len(images), self.encoder.sequence_length)
        keep, masked = utils.random_token_mask(size, self.mask_ratio, device=images.device)
        return masked_loss(self.predict(images, keep, masked), images, masked, self.patch)

    def predict(self, images: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Pixels of the ``masked`` (B, M) rows, (B, M, 3 p^2), from the rows ``keep`` (B, K) alone."""
        encoded = self.to_decoder(self.encoder.encode(images, idx_keep=keep))
        size = (len(images), self.encoder.sequence_length)
        tokens = utils.repeat_token(self.decoder.mask_token, size).to(encoded.dtype)
        decoded = self.decoder(utils.set_at_index(tokens, keep, encoded))
        pixels: Tensor = self.to_pixels(utils.get_at_index(decoded, masked))
        return pixels

    def follow(self, done: float) -> None:
        """Nothing follows the training."""


def masked_loss(predicted: Tensor, images: Tensor, masked: Tensor, patch: int) -> Tensor:
    """Mean squared error on the pixels of the masked patches, each patch normalised by its own mean and variance.

    Args:
        predicted: (B, M, 3 p^2), pixels in the order row, column, channel.
        images: (B, 3, H, W).
        masked: (B, M) rows of the sequence, in which CLS is row 0.
    """
    patches = utils.get_at_index(utils.patchify(images, patch), masked - 1)
    return F.mse_loss(predicted.float(), utils.normalize_mean_var(patches))
