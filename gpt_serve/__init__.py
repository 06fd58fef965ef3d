"""Serve many vision tasks from one frozen Vision Transformer with gated prompt adapters.

Attributes load on first use, so that ``import gpt_serve`` stays instant (no torch).
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_serve.adapters.adapter import Adapter
    from gpt_serve.adapters.store import AdapterStore
    from gpt_serve.engine.classify import Prediction
    from gpt_serve.engine.engine import Engine
    from gpt_serve.engine.segment import Segmentation
    from gpt_serve.errors import GPTServeError
    from gpt_serve.model.backbone import Backbone

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterStore",
    "Backbone",
    "Engine",
    "GPTServeError",
    "Prediction",
    "Segmentation",
    "__version__",
]

_HOMES = {
    "Adapter": "adapters.adapter",
    "AdapterStore": "adapters.store",
    "Backbone": "model.backbone",
    "Engine": "engine.engine",
    "GPTServeError": "errors",
    "Prediction": "engine.classify",
    "Segmentation": "engine.segment",
}

# What dependencies report to their makers unless told otherwise. Each reads its variable when it is imported, which is
# after this, in child processes too. Who wants the reports sets the variable.
for _variable, _off in {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime: a device id on disk, events to Microsoft
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray: the cluster and what runs on it
    "HF_HUB_DISABLE_TELEMETRY": "1",  # timm and datasets, by way of huggingface_hub: versions, what started it
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets: a request for each data set that is opened
}.items():
    os.environ.setdefault(_variable, _off)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
