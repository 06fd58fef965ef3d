"""Masks from mixed batches: each row as if it were alone, and as a slow reference computes it."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine, TorchForward
from gpt_serve.engine.segment import Segmentation
from gpt_serve.errors import InvalidAdapter
from gpt_serve.images.preprocess import cut_windows, plan_windows
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Tap
from tests import reference
from tests.factories import CHANNELS, make_adapter, make_segmenter
from tests.plain_setr import PlainSetr


def adapters_of(backbone: Backbone) -> dict[str, Adapter]:
    """Heads of each kind, behind prompts of each kind, and classifiers."""
    spec = backbone.spec
    two = {"taps": (Tap(0, "grid"), Tap(2, "grid")), "head_weight": torch.randn(4, 48)}
    adapters = [
        make_segmenter(spec, "linear", method="linear", seed=1),
        make_segmenter(spec, "gated", prompts=4, classes=7, mode="windows", seed=2),
        make_segmenter(spec, "deep", method="vpt-deep", prompts=2, seed=3, mode="pad", **two),
        make_segmenter(spec, "setr", decoder=True, prompts=3, seed=4, mode="windows"),
        make_segmenter(spec, "setr-early", decoder=True, method="linear", seed=5, taps=(Tap(1, "raw"),)),
        make_adapter(spec, "flowers", method="linear", pool="cls", seed=6),
        make_adapter(spec, "birds", prompts=3, seed=7),
    ]
    return {adapter.task: adapter for adapter in adapters}


@pytest.fixture(scope="module")
def store(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("masks"))
    for adapter in adapters_of(tiny).values():
        store.publish(adapter)
    return store


@pytest.fixture
def engine(tiny: Backbone, store: AdapterStore) -> Engine:
    return Engine(tiny, store)


def picture(seed: int, height: int = 24, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def check_same(actual: object, expected: object) -> None:
    if isinstance(actual, Segmentation):
        assert isinstance(expected, Segmentation)
        assert (actual.task, actual.size, actual.labels) == (expected.task, expected.size, expected.labels)
        np.testing.assert_allclose(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    else:
        assert isinstance(actual, Prediction) and isinstance(expected, Prediction), (actual, expected)
        torch.testing.assert_close(actual.probabilities, expected.probabilities, rtol=1e-5, atol=1e-5)


def test_rows_of_both_kinds_share_a_pass(engine: Engine, store: AdapterStore) -> None:
    requests = [(task, picture(seed)) for seed, task in enumerate([*store.tasks(), *reversed(store.tasks())])]
    alone = [engine.predict([request])[0] for request in requests]
    for actual, expected in zip(engine.predict(requests), alone, strict=True):
        check_same(actual, expected)


def test_all_tasks_of_one_image_share_it(engine: Engine, store: AdapterStore) -> None:
    image = picture(1)
    (together,) = engine.predict([(store.tasks(), image)])
    for task, answer in zip(store.tasks(), together, strict=True):
        check_same(answer, engine.predict([(task, image)])[0])


def reference_logits(backbone: Backbone, adapter: Adapter, image: Tensor) -> Tensor:
    """One input of the backbone's size, uint8 (3, H, W), to (C, y, x), block by block and head by head."""
    own = adapter.preprocess
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (own.mean, own.std))
    given = {name: getattr(adapter, name) for name in ("prompt", "gamma", "tau")}
    nothing = {"head_weight": torch.zeros(1, 24), "head_bias": torch.zeros(1)}
    traces = reference.forward(backbone.model, (image / 255 - mean) / std, pool="cls", **given, **nothing).blocks
    grids = [traces[tap.block].patches for tap in adapter.taps]
    if adapter.decoder:
        return plain_decoder(adapter)(grids[0][None])[0]
    tokens = torch.cat([backbone.model.final_norm(grid) for grid in grids], dim=1)
    return (tokens @ adapter.head_weight.T + adapter.head_bias).T.reshape(-1, 4, 4)


def plain_decoder(adapter: Adapter) -> PlainSetr:
    plain = PlainSetr(24, CHANNELS, len(adapter.labels), (4, 4)).eval()
    own = adapter.decoder
    plain.norm.load_state_dict({"weight": own["head.norm.weight"], "bias": own["head.norm.bias"]})
    for number, (convolution, norm) in enumerate(plain.convolutions(), start=1):
        convolution.load_state_dict({part: own[f"head.conv{number}.{part}"] for part in ("weight", "bias")})
        norm.running_var.fill_(1 - norm.eps)
    plain.classifier.load_state_dict({"weight": adapter.head_weight[..., None, None], "bias": adapter.head_bias})
    return plain


@torch.no_grad()
@pytest.mark.parametrize("task", ["linear", "gated", "deep", "setr", "setr-early"])
def test_a_mask_is_what_the_reference_computes(engine: Engine, tiny: Backbone, task: str) -> None:
    adapter, image = adapters_of(tiny)[task], picture(3)
    adapter = replace(adapter, head_weight=engine.bank.store.load(task).adapter.head_weight)
    (answer,) = engine.predict([(task, image)])
    assert isinstance(answer, Segmentation)
    plan = plan_windows(image, adapter.preprocess, (4, 4))
    windows = [reference_logits(tiny, adapter, window) for window in cut_windows(image, adapter.preprocess, plan)]
    rows, columns = (side * windows[0].shape[1] // 4 for side in plan.patches)
    total, count = torch.zeros(len(adapter.labels), rows, columns), torch.zeros(rows, columns)
    for window, (top, left) in zip(windows, plan.windows, strict=True):
        y, x = (start * window.shape[1] // 4 for start in (top, left))
        total[:, y : y + window.shape[1], x : x + window.shape[2]] += window[:, : rows - y, : columns - x]
        count[y : y + window.shape[1], x : x + window.shape[2]] += 1
    expected = total / count
    torch.testing.assert_close(torch.from_numpy(answer.logits), expected, rtol=1e-5, atol=1e-5)
    scaled = F.interpolate(expected[None], (24, 40), mode="bilinear", align_corners=False)[0]
    assert (torch.from_numpy(answer.mask) == scaled.argmax(0)).float().mean() > 0.999
    assert answer.shares.sum() == pytest.approx(1)


def test_the_mask_has_the_size_of_the_image_after_exif(engine: Engine) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(picture(5, 30, 50).permute(1, 2, 0).numpy()).save(file, "JPEG", exif=exif)
    (answer,) = engine.predict([("gated", file.getvalue())])
    assert isinstance(answer, Segmentation) and answer.mask.shape == (50, 30)


def test_only_rows_that_read_patches_get_them(
    engine: Engine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[list[tuple[int, ...]]] = []
    forward = engine.forward
    assert isinstance(forward, TorchForward)

    def seen(rows: Sequence[object]) -> object:
        features = forward(rows)
        shapes.append([tuple(tensor.shape) for tensor in features.tapped])
        return features

    monkeypatch.setattr(engine, "forward", seen)
    engine.predict([(task, picture(seed)) for seed, task in enumerate(["flowers", "linear", "flowers", "linear"])])
    ((pooled, patches),) = shapes
    assert sorted([pooled, patches], key=len) == [(4, 24), (2, 16, 24)]


def test_numbers_that_are_none_are_refused(tiny: Backbone, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    huge = torch.full((4, 24), 3e38)
    store.publish(make_segmenter(tiny.spec, "huge", head_weight=huge))
    store.publish(make_segmenter(tiny.spec, "fine", mode="windows"))
    refused, answer = Engine(tiny, store).predict([("huge", picture(1)), ("fine", picture(1))])
    assert isinstance(refused, InvalidAdapter) and isinstance(answer, Segmentation)
