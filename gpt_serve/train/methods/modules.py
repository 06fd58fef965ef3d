"""What a training loop fits: the interface that adapters and full fine-tuning share, and full fine-tuning itself.

Full fine-tuning is the yardstick that adapters are compared with. Trained and evaluated, never served.
"""

import copy

from torch import Tensor, nn

from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import Trunk, embed, prompted_features
from gpt_serve.train.methods.heads import HeadInit, HeadNorm, make_head


class TaskModule(nn.Module):
    """Everything that is trained for one task.

    Attributes:
        head: (C, D) and (C,), the linear classifier.
        head_norm: before it; None for none.
    """

    head: nn.Linear
    head_norm: "HeadNorm | None"

    def features(self, model: nn.Module, images: Tensor | Trunk) -> Tensor:
        """The features (B, D) of normalised images (B, 3, H, W), after the norm of the frozen ``model``.

        In place of images, an adapter takes what the first blocks of ``model`` have made of them.
        """
        raise NotImplementedError

    def seen(self, features: Tensor) -> Tensor:
        """``features`` as the head sees them, after `head_norm` if there is one; both are (B, D)."""
        return features if self.head_norm is None else self.head_norm(features)

    def forward(self, model: nn.Module, images: Tensor | Trunk) -> Tensor:
        """The logits (B, C) of what `features` takes."""
        logits: Tensor = self.head(self.seen(self.features(model, images)))
        return logits

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the head."""
        return list(self.head.parameters())

    def steering(self) -> list[nn.Parameter]:
        """The parameters that are learned besides the head."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("head.")]

    def anneal(self, progress: float) -> None:
        """Do what is due before each epoch; ``progress`` is the share of the epochs that are done, in [0, 1]."""

    def clamp(self) -> None:
        """Bring parameters back into their range; called after each optimizer step."""


class FullModule(TaskModule):
    """A copy of the backbone of which everything is trained, and a head.

    Args:
        backbone: stays as it is.
        classes: ``C``.
        head_init: see `make_head`.
    """

    def __init__(self, backbone: Backbone, classes: int, head_init: HeadInit) -> None:
        super().__init__()
        spec = backbone.spec
        self.model = copy.deepcopy(backbone.model).requires_grad_(True)
        self.head_norm = None
        self.head = make_head(spec.width, classes, head_init)
        self._bare = AdapterBatch.single(depth=spec.depth, width=spec.width, pool=spec.pool, device=backbone.device)

    def features(self, model: nn.Module, images: Tensor | Trunk) -> Tensor:
        """The features (B, D) of normalised images (B, 3, H, W), by the module's own copy; ``model`` plays no part."""
        assert isinstance(images, Tensor)  # no block of this module is frozen
        return prompted_features(self.model, embed(self.model, images), self._bare)

    def weights(self) -> dict[str, Tensor]:
        """float32 copies on the CPU, by timm's names for a model with a classifier."""
        tensors = self.model.state_dict() | {f"head.{name}": value for name, value in self.head.state_dict().items()}
        return {name: value.detach().float().cpu().contiguous().clone() for name, value in tensors.items()}
