"""From a backbone and a folder of adapters to an engine that is ready to answer."""

import copy
import io
import logging
from pathlib import Path

import torch
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.bank import DEFAULT_BANK_BYTES, DEFAULT_HOST_BYTES
from gpt_serve.engine.engine import Engine, Forward, TorchForward, planner_for
from gpt_serve.engine.trunks import CachedForward, TrunkCache
from gpt_serve.images.decode import ImageLimits
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.model.prompted import embed, prompted_features
from gpt_serve.specs import Precision

logger = logging.getLogger("gpt_serve.engine")


def build_engine(
    backbone: Backbone,
    store: AdapterStore,
    *,
    precision: Precision = "fp32",
    onnx: bool = False,
    compiled: bool = False,
    bank_bytes: int = DEFAULT_BANK_BYTES,
    host_bytes: int = DEFAULT_HOST_BYTES,
    trunk_cache_bytes: int = 0,
    limits: ImageLimits = ImageLimits(),
    max_batch: int = 64,
) -> Engine:
    """An engine on the device of ``backbone``, warmed up.

    Args:
        store: the adapters.
        precision: of weights and activations.
        onnx: let onnxruntime compute the passes that it is faster at; needs ``fp32``.
        compiled: let ``torch.compile`` fuse the blocks.
        trunk_cache_bytes: memory on the device for what images made of blocks that no task touches, see
            `gpt_serve.engine.trunks`; 0 for none.
        bank_bytes: see `Engine`, as are the others.

    Raises:
        ExportError: the backbone has no graph that answers as torch does, or the graph would not run on its device.
        UsageError: the device has no room for the bank.
    """
    if precision == "bf16":
        backbone.cast(torch.bfloat16)
    by_torch = TorchForward(backbone, compiled=compiled)
    forward = faster_forward(backbone) if onnx else by_torch
    if trunk_cache_bytes:
        forward = CachedForward(backbone, forward, TrunkCache(trunk_cache_bytes), by_torch.run_block)
    engine = Engine(
        backbone,
        store,
        bank_bytes=bank_bytes,
        host_bytes=host_bytes,
        limits=limits,
        max_batch=max_batch,
        forward=forward,
    )
    _warm_up(engine, store, backbone)
    logger.info("engine: %s on %s", "onnxruntime and torch" if onnx else "torch", backbone.device)
    return engine


def faster_forward(backbone: Backbone, folder: Path | None = None) -> Forward:
    """For each pass the faster one of onnxruntime and torch; the graph is kept in ``folder``, None for the cache."""
    from gpt_serve.engine.onnx import FasterForward, OnnxForward, serving_graph

    on_cpu = backbone.device.type == "cpu"
    host = backbone if on_cpu else Backbone(copy.deepcopy(backbone.model), backbone.spec, "cpu")
    graph = serving_graph(host, str(backbone.device), folder)
    return FasterForward(OnnxForward(graph), TorchForward(backbone), planner_for(backbone))


def _warm_up(engine: Engine, store: AdapterStore, backbone: Backbone) -> None:
    """Whatever the first request would have to wait for: compiled kernels, filled caches, threads."""
    spec = backbone.spec
    height, width = spec.preprocess.input_size
    with torch.inference_mode():  # there may be no task to do it with
        bare = AdapterBatch.single(depth=spec.depth, width=spec.width, pool=spec.pool, device=backbone.device)
        images = torch.zeros(1, 3, height, width, device=backbone.device, dtype=backbone.dtype)
        prompted_features(backbone.model, embed(backbone.model, images), bare)
    image = io.BytesIO()
    Image.new("RGB", (width, height)).save(image, "JPEG")
    for count in (1, 3):  # a compiled block takes a batch of one for a case of its own
        engine.predict([(task, image.getvalue()) for task in store.tasks()[:1] * count])
