"""The heavy half of the worker: torch, the backbone, the engine. Only the worker process imports it."""

import io

import torch
from PIL import Image

from gpt_serve.backbone import Backbone
from gpt_serve.engine import Engine
from gpt_serve.images import ImageLimits
from gpt_serve.serve.config import ServeConfig
from gpt_serve.specs import BackboneSpec
from gpt_serve.store import AdapterStore


def load_engine(config: ServeConfig, device: str) -> tuple[Engine, BackboneSpec]:
    """The engine that ``config`` describes, warmed up.

    Raises:
        BackboneError: the backbone cannot be loaded.
    """
    backbone = Backbone.load(config.backbone, checkpoint=config.checkpoint, input_size=config.input_size, device=device)
    store = AdapterStore(config.adapters, backbone.spec)
    limits = ImageLimits(max_bytes=config.max_body_bytes, max_pixels=config.max_pixels)
    engine = Engine(backbone, store, limits=limits)
    _warm_up(engine, store, backbone)
    return engine, backbone.spec


def _warm_up(engine: Engine, store: AdapterStore, backbone: Backbone) -> None:
    """The first pass compiles kernels and fills caches; do it before the first client waits for it."""
    height, width = backbone.spec.preprocess.input_size
    with torch.inference_mode():
        backbone.model(torch.zeros(1, 3, height, width, device=backbone.device))
    image = io.BytesIO()
    Image.new("RGB", (width, height)).save(image, "JPEG")
    engine.predict([(task, image.getvalue()) for task in store.tasks()[:1]])
