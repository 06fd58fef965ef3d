"""A backbone in a process that was told how to load it, and what is to be known of it in one that has not."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import BackboneSpec, Family
from gpt_serve.train.fit import make_deterministic

LoadArguments = tuple[tuple[str, Any], ...]  # of `Backbone.load`


class BackboneFacts(NamedTuple):
    """What is to be known of a backbone where it is not loaded."""

    name: str
    family: Family | None
    spec: BackboneSpec


@lru_cache(maxsize=1)
def load_backbone(arguments: LoadArguments) -> Backbone:
    """Load a backbone to train on, once for all that a process trains; the device may be ``auto``."""
    given = dict(arguments)
    if given["device"] == "auto":
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = Backbone.load(**given)
    make_deterministic(loaded)
    return loaded


def backbone_facts(arguments: LoadArguments) -> BackboneFacts:
    """Load a backbone and describe it."""
    loaded = load_backbone(arguments)
    return BackboneFacts(loaded.name, loaded.family, loaded.spec)
