"""From the engine's answers to responses. Runs where the engine does: HTTP's side passes on what is made here."""

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pycocotools import mask as coco

from gpt_serve.errors import InvalidRequest
from gpt_serve.images.mask_files import png
from gpt_serve.serve.messages import Answer, Format, MaskFormat

if TYPE_CHECKING:
    from gpt_serve.engine.classify import Prediction
    from gpt_serve.engine.looker import Look
    from gpt_serve.engine.segment import Segmentation


def is_mask(result: object) -> bool:
    """Whether an answer gives a class for each pixel.

    Answers are told apart by what their classes have: to import these would import torch, which a stub has no need of.
    """
    return hasattr(type(result), "mask")  # of the object itself, it would be computed


def encode(result: "Prediction | Segmentation | Look", form: Format, seconds: Mapping[str, float]) -> Answer:
    """The response for one image and task.

    Args:
        form: what it is to look like.
        seconds: of `Answer`.

    Raises:
        InvalidRequest: the request asks for what answers of this kind do not have.
    """
    if hasattr(result, "picture"):
        look = cast("Look", result)
        return Answer(look.task, look.revision, _json(look.content()), seconds=dict(seconds))
    if is_mask(result):
        return _segmentation(cast("Segmentation", result), form, dict(seconds))
    prediction = cast("Prediction", result)
    content = prediction.to_dict(form.top_k)
    return Answer(prediction.task, prediction.revision, _json(content), seconds=dict(seconds))


def _segmentation(result: "Segmentation", form: Format, seconds: dict[str, float]) -> Answer:
    if form.top_k is not None and form.strict:
        raise InvalidRequest(f"task {result.task!r} answers with a mask of all its classes: leave out top_k")
    if form.picture:
        return Answer(result.task, result.revision, png(result.mask), "image/png", seconds)
    content = result.to_dict() | _mask(result, form.mask or "png")
    return Answer(result.task, result.revision, _json(content), seconds=seconds)


def _mask(result: "Segmentation", form: MaskFormat) -> dict[str, Any]:
    """The member ``mask``: a PNG file in base64, or COCO's run lengths of each class that has pixels."""
    if form == "none":
        return {}
    if form == "png":
        return {"mask": base64.b64encode(png(result.mask)).decode()}
    return {"mask": [_run_lengths(result, int(number)) for number in np.flatnonzero(result.shares)]}


def _run_lengths(result: "Segmentation", number: int) -> dict[str, Any]:
    """COCO's compressed run lengths of one class, column by column."""
    encoded = coco.encode(np.asfortranarray(result.mask == number, dtype=np.uint8))
    return {"id": number, "size": encoded["size"], "counts": encoded["counts"].decode()}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
