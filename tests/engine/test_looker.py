"""Pictures of attention: they show what `insight` measures, and their failures are their request's own."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.looker import LEAST_SIDE, Looker, picture
from gpt_serve.errors import DeadlineExceeded, GPTServeError, UndecodableImage, UnknownTask, UnsupportedImage
from gpt_serve.images.decode import ImageLimits, decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.insight.attention import adapter_rows, attention_maps, embed_pixels
from gpt_serve.model.backbone import Backbone
from tests.factories import make_adapter
from tests.serve.conftest import encode


@pytest.fixture
def bugs() -> list[Exception]:
    return []


@pytest.fixture
def looker(tiny: Backbone, tmp_path: Path, bugs: list[Exception]) -> Looker:
    store = AdapterStore(tmp_path)
    store.publish(make_adapter(tiny.spec, "birds"))
    return Looker(tiny, store, ImageLimits(), bugs.append)


def test_it_shows_what_insight_measures(looker: Looker, tiny: Backbone) -> None:
    image = encode(3)
    look = looker.submit("birds", image, time.monotonic() + 60).result(timeout=60)
    stored = looker.store.load("birds")
    seen = preprocess_image(decode(image), stored.adapter.preprocess)
    tokens = embed_pixels(tiny, seen[None], stored.adapter.preprocess)
    maps = attention_maps(tiny, tokens, adapter_rows(tiny, stored.adapter))
    heat = maps.maps[-1].mean(dim=0)
    assert (look.task, look.revision, look.block) == ("birds", stored.revision, tiny.spec.depth)
    assert look.most == pytest.approx(heat.max().item()) and look.picture == picture(seen, heat)
    assert look.content()["most"] == look.most


def test_the_brightest_part_gets_the_most_attention() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 5.0
    drawn = np.asarray(Image.open(io.BytesIO(picture(torch.zeros(3, 32, 32, dtype=torch.uint8), heat))))
    assert drawn.shape == (LEAST_SIDE, LEAST_SIDE, 3)
    row, column = np.unravel_index(drawn.sum(axis=2).argmax(), drawn.shape[:2])
    assert (4 * row // LEAST_SIDE, 4 * column // LEAST_SIDE) == (1, 2)
    assert picture(torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(4, 4)), "all of it may go to prompts"


@pytest.mark.parametrize(
    "task, image, error",
    [
        ("cars", encode(3), UnknownTask),
        ("birds", b"no image", UnsupportedImage),
        ("birds", encode(3)[:-200], UndecodableImage),
    ],
)
def test_what_cannot_be_drawn_says_why(
    looker: Looker, bugs: list[Exception], task: str, image: bytes, error: type[GPTServeError]
) -> None:
    with pytest.raises(error):
        looker.submit(task, image, time.monotonic() + 60).result(timeout=60)
    assert not bugs


def test_who_waits_too_long_costs_nothing(looker: Looker) -> None:
    with pytest.raises(DeadlineExceeded):
        looker.submit("birds", encode(3), time.monotonic() - 1).result(timeout=60)


def test_a_bug_is_told_and_fails_its_own_request(
    looker: Looker, bugs: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_serve.engine.looker.picture", lambda *_: 1 / 0)
    with pytest.raises(GPTServeError, match="^ZeroDivisionError while attention was drawn$"):
        looker.submit("birds", encode(3), time.monotonic() + 60).result(timeout=60)
    monkeypatch.undo()
    assert len(bugs) == 1 and looker.look("birds", encode(3)).picture
