"""What runs the forward pass faster: torch against onnxruntime, through the engine, on the same adapters and images."""

from functools import partial

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.setting import UNLIKE, Setting, answer, pixels, temporary_store, write_adapters
from gpt_serve.bench.timing import Row
from gpt_serve.engine.build import faster_forward
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import BUNDLED

CLOSED = ("vpt-deep", 100)  # what torch computes in both engines: no row of prompts behind closed gates
CLOSED_BATCHES = (1, 8, 32)


def bench_engines(setting: Setting) -> list[Row]:
    """Compare at each batch size, on images of the input's size: one task, as many as images, one with closed gates."""
    backbone, batches = setting.backbone, setting.scale.engine_batches
    most, rows = max(batches), []
    images = pixels(backbone, most)
    with temporary_store(backbone) as store:
        tasks = [adapter.task for adapter in write_adapters(store, backbone, "any", most, UNLIKE)]
        (closed,) = write_adapters(store, backbone, "closed", 1, [CLOSED])
        engines = {
            "torch": Engine(backbone, store, max_batch=most),
            "onnxruntime": onnx_engine(backbone, store, max_batch=most),
        }
        for batch in batches:
            kinds = {"one task": tasks[:1] * batch}
            if batch > 1:
                kinds[f"{batch} tasks, methods and P mixed"] = tasks[:batch]
            if batch in CLOSED_BATCHES:
                kinds["one task, {}, P = {}".format(*CLOSED)] = [closed.task] * batch
            for kind, chosen in kinds.items():
                requests = list(zip(chosen, images, strict=False))
                times = setting.time({name: partial(answer, engine, requests) for name, engine in engines.items()})
                rows += setting.rows("engines", f"batch {batch}, {kind}", batch, times)
    return rows


def onnx_engine(backbone: Backbone, store: AdapterStore, max_batch: int) -> Engine:
    """Make an engine that computes with onnxruntime where it is faster, as ``gpt-serve serve --engine onnx`` does.

    Graphs of random weights, which nobody needs again, are kept beside the store, where a server finds them that has
    this folder for its ``XDG_CACHE_HOME``.
    """
    kept = None if backbone.name in BUNDLED else store.root.parent / "gpt-serve"
    return Engine(backbone, store, max_batch=max_batch, forward=faster_forward(backbone, kept))
