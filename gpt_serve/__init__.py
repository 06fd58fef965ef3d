"""Serve many vision tasks from one frozen Vision Transformer with gated prompt adapters.

Attributes load on first use, so that ``import gpt_serve`` stays instant (no torch).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_serve.adapters.adapter import Adapter
    from gpt_serve.adapters.store import AdapterStore
    from gpt_serve.engine.engine import Engine, Prediction
    from gpt_serve.errors import GPTServeError
    from gpt_serve.model.backbone import Backbone

__version__ = "0.1.0"
__all__ = ["Adapter", "AdapterStore", "Backbone", "Engine", "GPTServeError", "Prediction", "__version__"]

_HOMES = {
    "Adapter": "adapters.adapter",
    "AdapterStore": "adapters.store",
    "Backbone": "model.backbone",
    "Engine": "engine.engine",
    "GPTServeError": "errors",
    "Prediction": "engine.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
