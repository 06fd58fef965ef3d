"""The heavy half of the worker: torch, the backbone, the engine. Only the worker process imports it."""

import ctypes
import io
import logging
from contextlib import suppress

import torch
from PIL import Image

from gpt_serve.backbone import Backbone
from gpt_serve.engine import Engine, Forward, TorchForward
from gpt_serve.images import ImageLimits
from gpt_serve.serve.config import ServeConfig
from gpt_serve.specs import BackboneSpec
from gpt_serve.store import AdapterStore

logger = logging.getLogger("gpt_serve.serve")


def load_engine(config: ServeConfig, device: str) -> tuple[Engine, BackboneSpec]:
    """The engine that ``config`` describes, warmed up.

    Raises:
        BackboneError: the backbone cannot be loaded.
        ExportError: it has no graph that answers as torch does, or the graph would not run on ``device``.
    """
    onnx = config.chosen_engine == "onnx"
    backbone = Backbone.load(
        config.backbone,
        checkpoint=config.checkpoint,
        input_size=config.input_size,
        device="cpu" if onnx else device,  # the graph, not the backbone, computes
    )
    store = AdapterStore(config.adapters, backbone.spec)
    limits = ImageLimits(max_bytes=config.max_body_bytes, max_pixels=config.max_pixels)
    forward = _onnx_forward(backbone, device) if onnx else _torch_forward(backbone)
    engine = Engine(backbone, store, limits=limits, forward=forward)
    _warm_up(engine, store, backbone.spec)
    logger.info("engine: %s on %s", "onnxruntime" if onnx else "torch", device)
    return engine, backbone.spec


def _torch_forward(backbone: Backbone) -> Forward:
    height, width = backbone.spec.preprocess.input_size
    with torch.inference_mode():  # the first pass compiles kernels and fills caches; there may be no task to do it with
        backbone.model(torch.zeros(1, 3, height, width, device=backbone.device))
    return TorchForward(backbone)


def _onnx_forward(backbone: Backbone, device: str) -> Forward:
    """The forward pass in onnxruntime; the backbone's own weights are freed."""
    from gpt_serve.export.cache import serving_graph
    from gpt_serve.export.forward import OnnxForward

    forward = OnnxForward(serving_graph(backbone, device))
    backbone.model.to_empty(device="meta")
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is freed in small pieces otherwise stays with the process
    return forward


def _warm_up(engine: Engine, store: AdapterStore, spec: BackboneSpec) -> None:
    """Whatever the first request would have to wait for."""
    height, width = spec.preprocess.input_size
    image = io.BytesIO()
    Image.new("RGB", (width, height)).save(image, "JPEG")
    engine.predict([(task, image.getvalue()) for task in store.tasks()[:1]])
