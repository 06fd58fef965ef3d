"""The heavy half of the worker: torch, the backbone, the engine. Only the worker process imports it."""

import copy
import io
import logging
from pathlib import Path

import torch
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.engine import Engine, Forward, TorchForward, planner_for
from gpt_serve.images.decode import ImageLimits
from gpt_serve.model.backbone import Backbone
from gpt_serve.serve.config import ServeConfig
from gpt_serve.specs import BackboneSpec

logger = logging.getLogger("gpt_serve.serve")


def load_engine(config: ServeConfig, device: str) -> tuple[Engine, BackboneSpec]:
    """The engine that ``config`` describes, warmed up.

    Raises:
        BackboneError: the backbone cannot be loaded.
        ExportError: it has no graph that answers as torch does, or the graph would not run on ``device``.
        UsageError: the device has no room for the bank.
    """
    backbone = Backbone.load(config.backbone, checkpoint=config.checkpoint, input_size=config.input_size, device=device)
    if config.precision == "bf16":
        backbone.cast(torch.bfloat16)
    onnx = config.chosen_engine == "onnx"
    store = AdapterStore(config.adapters, backbone.spec)
    engine = Engine(
        backbone,
        store,
        bank_bytes=config.bank_bytes,
        host_bytes=config.host_bytes,
        limits=ImageLimits(max_bytes=config.max_body_bytes, max_pixels=config.max_pixels),
        max_batch=config.max_batch_size,
        forward=faster_forward(backbone) if onnx else TorchForward(backbone, compiled=config.compile),
    )
    _warm_up(engine, store, backbone)
    logger.info("engine: %s on %s", "onnxruntime and torch" if onnx else "torch", device)
    return engine, backbone.spec


def faster_forward(backbone: Backbone, folder: Path | None = None) -> Forward:
    """For each pass the faster one of onnxruntime and torch; the graph is kept in ``folder``, None for the cache."""
    from gpt_serve.engine.onnx import FasterForward, OnnxForward
    from gpt_serve.engine.onnx_cache import serving_graph

    on_cpu = backbone.device.type == "cpu"
    host = backbone if on_cpu else Backbone(copy.deepcopy(backbone.model), backbone.spec, "cpu")
    graph = serving_graph(host, str(backbone.device), folder)
    return FasterForward(OnnxForward(graph), TorchForward(backbone), planner_for(backbone))


def _warm_up(engine: Engine, store: AdapterStore, backbone: Backbone) -> None:
    """Whatever the first request would have to wait for: compiled kernels, filled caches, threads."""
    height, width = backbone.spec.preprocess.input_size
    with torch.inference_mode():  # there may be no task to do it with
        backbone.model(torch.zeros(1, 3, height, width, device=backbone.device, dtype=backbone.dtype))
    image = io.BytesIO()
    Image.new("RGB", (width, height)).save(image, "JPEG")
    for count in (1, 3):  # a compiled block takes a batch of one for a case of its own
        engine.predict([(task, image.getvalue()) for task in store.tasks()[:1] * count])
