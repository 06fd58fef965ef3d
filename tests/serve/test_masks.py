"""Masks over HTTP: what the engine says, in the form that the client asked for."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.segment import Segmentation
from gpt_serve.errors import InvalidRequest
from gpt_serve.images.mask_files import palette, png
from gpt_serve.model.backbone import Backbone
from gpt_serve.serve.encode import encode
from gpt_serve.serve.messages import Answer, Format
from tests.factories import make_segmenter
from tests.serve.conftest import encode as image_file
from tests.serve.harness import ServerProcess, check_problem

# Of its decoder, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def result() -> Segmentation:
    """Of an image of 5 x 7 pixels, for three classes of which the last has none."""
    logits = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    logits[2] = -100
    return Segmentation("roads", "0123456789ab", ("road", "sky", "caf\u00e9"), (5, 7), logits)


@pytest.fixture
def labels() -> Prediction:
    return Prediction("birds", "0123456789ab", ("a", "b"), torch.tensor([0.25, 0.75]))


def content(answer: Answer) -> Any:
    assert answer.media_type == "application/json"
    return json.loads(answer.content)


def ids_of(file: bytes) -> Any:
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, image.mode) == ("PNG", "P")
        return np.asarray(image)


def test_an_answer_with_a_mask(result: Segmentation) -> None:
    told = content(encode(result, Format(), {"computing": 0.5}))
    mask = ids_of(base64.b64decode(told.pop("mask")))
    assert mask.shape == (5, 7) and (mask == result.mask).all()
    assert told == {
        "task": "roads",
        "revision": "0123456789ab",
        "kind": "segmentation",
        "width": 7,
        "height": 5,
        "classes": [
            {"id": number, "label": label, "share": pytest.approx((mask == number).mean())}
            for number, label in enumerate(("road", "sky", "caf\u00e9"))
        ],
    }
    assert encode(result, Format(), {"computing": 0.5}).seconds == {"computing": 0.5}


def test_run_lengths_are_cocos(result: Segmentation) -> None:
    told = content(encode(result, Format(mask="rle"), {}))["mask"]
    assert [one["id"] for one in told] == [0, 1], "of those that have pixels"
    for one in told:
        assert one["size"] == [5, 7]
        assert (coco.decode({"size": one["size"], "counts": one["counts"]}) == (result.mask == one["id"])).all()


def test_no_mask_and_nothing_but_the_mask(result: Segmentation) -> None:
    assert "mask" not in content(encode(result, Format(mask="none"), {}))
    picture = encode(result, Format(picture=True), {})
    assert picture.media_type == "image/png" and (ids_of(picture.content) == result.mask).all()


def test_what_answers_of_a_kind_do_not_have_is_refused(result: Segmentation, labels: Prediction) -> None:
    with pytest.raises(InvalidRequest, match="'roads' answers with a mask of all its classes: leave out top_k"):
        encode(result, Format(top_k=3), {})
    assert encode(labels, Format(mask="rle"), {}).content == encode(labels, Format(), {}).content, "it has no mask"
    for one in (result, labels):  # where several tasks are asked, it is for others
        assert encode(one, Format(3, "none", strict=False), {}).task == one.task


def test_colours_are_those_of_pascal_voc() -> None:
    """The first ones of its development kit, and every id in a file of its own colour."""
    colours = np.frombuffer(palette(), np.uint8).reshape(256, 3)
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert [tuple(colour) for colour in colours[:7].tolist()] == known
    assert colours[15].tolist() == [192, 128, 128] and colours[20].tolist() == [0, 64, 128]
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with Image.open(io.BytesIO(png(ids))) as image:
        assert (np.asarray(image) == ids).all() and (np.asarray(image.convert("RGB")).reshape(-1, 3) == colours).all()


# The real server


@pytest.fixture(scope="module")
def segmenting(server: ServerProcess, bundled: Backbone) -> Iterator[ServerProcess]:
    """With two tasks more: one mask of an input, one of windows."""
    store = AdapterStore(server.adapters)
    store.publish(make_segmenter(bundled.spec, "squashed", seed=1))
    store.publish(make_segmenter(bundled.spec, "windowed", seed=2, mode="windows", prompts=2, classes=7))
    yield server
    for task in ("squashed", "windowed"):
        shutil.rmtree(server.adapters / task)


PHOTO = image_file(3, "JPEG", (90, 50))


def ask(server: ServerProcess, *tasks: str, accept: str = "*/*", **fields: str) -> httpx.Response:
    data = {"task": list(tasks)} | fields
    return server.client.post(
        server.url + "/predict", data=data, files={"image": ("x", PHOTO)}, headers={"accept": accept}
    )


@pytest.mark.parametrize("task", ["squashed", "windowed"])
def test_masks_are_the_engines(segmenting: ServerProcess, bundled: Backbone, task: str) -> None:
    (expected,) = Engine(bundled, AdapterStore(segmenting.adapters)).predict([(task, PHOTO)])
    assert isinstance(expected, Segmentation)
    told = ask(segmenting, task).json()
    assert (told["kind"], told["width"], told["height"]) == ("segmentation", 90, 50)
    assert (told["task"], told["revision"]) == (task, expected.revision)
    mask = ids_of(base64.b64decode(told["mask"]))
    assert mask.shape == (50, 90) and (mask != expected.mask).mean() < 1e-3, "but for equal probabilities"
    picture = ask(segmenting, task, accept="image/png")
    assert picture.headers["content-type"] == "image/png" and (ids_of(picture.content) == mask).all()
    raw = segmenting.client.post(f"{segmenting.url}/predict/{task}?mask=rle", content=PHOTO).json()
    for one in raw["mask"]:
        assert (coco.decode({"size": one["size"], "counts": one["counts"]}) == (mask == one["id"])).all()
    assert sum(entry["share"] for entry in told["classes"]) == pytest.approx(1, abs=1e-5)


def test_both_kinds_in_one_request(segmenting: ServerProcess) -> None:
    wishes = {"accept": "image/png", "top_k": "2", "mask": "none"}
    first, second, third = ask(segmenting, "squashed", "birds", "nobody", **wishes).json()
    assert (first["kind"], first["task"]) == ("segmentation", "squashed") and "mask" not in first
    assert second["task"] == "birds" and len(second["predictions"]) == 2
    assert third["status"] == 404


def test_bad_wishes_are_problems(segmenting: ServerProcess) -> None:
    assert "png, rle, none" in check_problem(ask(segmenting, "squashed", mask="svg"), 400)["detail"]
    assert "leave out top_k" in check_problem(ask(segmenting, "squashed", top_k="3"), 400)["detail"]
    assert ask(segmenting, "birds", accept="image/png").json()["task"] == "birds"
