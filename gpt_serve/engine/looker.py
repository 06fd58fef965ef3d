"""Where an adapter looks in an image, drawn for people: beside the predictions, and out of their way."""

import io
import math
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.priority import yield_to_others
from gpt_serve.errors import DeadlineExceeded, GPTServeError
from gpt_serve.images.decode import ImageLimits, decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.insight.attention import adapter_rows, attention_maps, embed_pixels
from gpt_serve.model.backbone import Backbone

LEAST_SIDE = 256  # of a picture, in pixels: inputs of 32 would be hard to see
GREY, HEAT = 0.4, 0.6  # shares of the image and of the attention in a picture


@dataclass(frozen=True, eq=False)
class Look:
    """What `Looker` answers.

    Attributes:
        task: the adapter's name.
        revision: of the adapter file, first 12 hex digits of its SHA-256.
        block: whose attention it is, the last one, counted from 1.
        most: attention on the patch that gets most, as a multiple of what it were if all patches got the same.
        picture: PNG of the image as the backbone saw it, grey, with the attention over it in colour.
    """

    task: str
    revision: str
    block: int
    most: float
    picture: bytes

    def content(self) -> dict[str, Any]:
        """Plain values for JSON, the picture in base64."""
        plain = {"task": self.task, "revision": self.revision, "block": self.block, "most": self.most}
        return plain | {"picture": b64encode(self.picture).decode()}


class Looker:
    """Draws the attention of the last block's pooled rows, see `gpt_serve.insight.attention`.

    One image at a time, in one thread that yields to all others: predictions do not wait for it.

    Args:
        backbone: shared with the engine, which computes meanwhile.
        store: where adapters are read from, each time anew.
        limits: of each image.
        on_error: told of every exception that is a bug or a broken device.
    """

    def __init__(
        self, backbone: Backbone, store: AdapterStore, limits: ImageLimits, on_error: Callable[[Exception], None]
    ) -> None:
        self.backbone = backbone
        self.on_error = on_error
        self.store = store
        self.limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="look", initializer=_begin)

    def submit(self, task: str, image: bytes, expires: float) -> "Future[Look]":
        """Draw ``image`` for ``task``, if that is begun before ``time.monotonic()`` is ``expires``.

        Returns:
            What will hold the picture, or raise the request's `GPTServeError`. It may be cancelled.
        """
        return self._thread.submit(self._guarded, task, image, expires)

    def _guarded(self, task: str, image: bytes, expires: float) -> Look:
        try:
            return self.look(task, image, expires)
        except GPTServeError:
            raise
        except Exception as error:
            self.on_error(error)
            raise GPTServeError(f"{type(error).__name__} while attention was drawn") from error

    def look(self, task: str, image: bytes, expires: float = math.inf) -> Look:
        """What `submit` does, now. Raises the request's `GPTServeError`."""
        if expires <= time.monotonic():
            raise DeadlineExceeded("the deadline passed while the request was queued")
        stored = self.store.load(task, self.backbone.spec)
        preprocess = stored.adapter.preprocess
        seen = preprocess_image(decode(image, self.limits, exif=preprocess.exif), preprocess)
        with torch.inference_mode():
            tokens = embed_pixels(self.backbone, seen[None], preprocess)
            maps = attention_maps(self.backbone, tokens, adapter_rows(self.backbone, stored.adapter)).maps
        heat = maps[-1].mean(dim=0)
        return Look(task, stored.revision, len(maps), heat.max().item(), picture(seen, heat))


def picture(image: Tensor, heat: Tensor) -> bytes:
    """A PNG of ``image``, uint8 (3, H, W), in grey under ``heat``, (h, w) from 0; whole multiples of its size."""
    height, width = image.shape[1:]
    scale = -(-LEAST_SIDE // min(height, width))
    size = (width * scale, height * scale)
    grey = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L").resize(size, Image.Resampling.BICUBIC)
    level = (heat / heat.max().clamp(min=1e-12)).float().numpy()
    spread = np.asarray(Image.fromarray(level).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    colours = _colours()[(255 * spread).round().astype(np.uint8)]
    both = GREY * np.asarray(grey, dtype=np.float32)[:, :, None] + HEAT * colours
    file = io.BytesIO()
    Image.fromarray(both.round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@cache
def _colours() -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """(256, 3), from 0 to 255: as bright as the attention is high, for all eyes and in grey."""
    from matplotlib import colormaps  # a third of a second, and only where somebody looks

    return (255 * colormaps["inferno"](range(256))[:, :3]).astype(np.float32)


def _begin() -> None:
    torch.set_num_threads(1)
    yield_to_others()
