"""What shared blocks made of an image is kept: later questions about it compute the rest, and get the same answers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine import trunks
from gpt_serve.engine.engine import Engine, Prediction, TorchForward
from gpt_serve.engine.trunks import CachedForward, TrunkCache
from gpt_serve.model import prompted
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Tap
from tests.factories import make_adapter, make_segmenter


@pytest.fixture(scope="module")
def store(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    """Probes of several poolings and blocks, prompts that enter the last of three blocks, the first, and a mask."""
    spec, store = tiny.spec, AdapterStore(tmp_path_factory.mktemp("trunks"))
    two = {"taps": (Tap(0, "patches"), Tap(2, "cls")), "head_weight": torch.randn(4, 2 * spec.width)}
    grey = replace(spec.preprocess, mean=(0.1, 0.4, 0.7))
    late: dict[str, Any] = {"first_block": 2, "gamma": torch.zeros(0), "tau": None}
    for adapter in (
        make_adapter(spec, "probe", method="linear", seed=1),
        make_adapter(spec, "cls", method="linear", pool="cls", seed=2),
        make_adapter(spec, "two", method="linear", seed=3, **two),
        make_adapter(spec, "grey", method="linear", preprocess=grey, seed=4),
        make_adapter(spec, "late", seed=5, **late),
        make_adapter(spec, "late-two", seed=6, prompts=5, **late | two),
        make_adapter(spec, "early", seed=7),
        make_segmenter(spec, "roads", method="linear", seed=8),
    ):
        store.publish(adapter)
    return store


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images or rows each block was asked to compute, block by block."""
    computed: list[int] = []
    block = prompted.block

    def counted(blk: Any, x: Tensor, *arguments: Any) -> Tensor:
        computed.append(len(x))
        return block(blk, x, *arguments)

    monkeypatch.setattr(prompted, "block", counted)
    return computed


def cached(tiny: Backbone, store: AdapterStore, nbytes: int = 2**20) -> tuple[Engine, TrunkCache]:
    cache = TrunkCache(nbytes)
    # Looked up when it runs, so that a test may count it.
    forward = CachedForward(tiny, TorchForward(tiny), cache, lambda *arguments: prompted.block(*arguments))
    return Engine(tiny, store, forward=forward), cache


def picture(seed: int) -> Tensor:
    return torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def check_same(actual: Sequence[object], expected: Sequence[object]) -> None:
    for one, other in zip(actual, expected, strict=True):
        if isinstance(one, Prediction):
            assert isinstance(other, Prediction) and one.task == other.task
            torch.testing.assert_close(one.probabilities, other.probabilities, rtol=1e-6, atol=1e-6)
        else:
            assert (one.mask == other.mask).all()  # type: ignore[attr-defined]


def test_answers_are_the_same_whatever_is_kept(tiny: Backbone, store: AdapterStore) -> None:
    """All tasks of two images, asked in every order: nothing kept, all kept, some kept."""
    plain, (engine, cache) = Engine(tiny, store), cached(tiny, store)
    requests = [(task, picture(seed)) for seed in (1, 2) for task in store.tasks()]
    expected = plain.predict(requests)
    for _ in range(2):
        check_same(engine.predict(requests), expected)
    for order in (range(15, -1, -1), *([at] for at in range(16)), (3, 4, 11), (0, 8, 7), (4, 5, 12, 13)):
        check_same(engine.predict([requests[at] for at in order]), [expected[at] for at in order])
    assert cache.hits > 10 and cache.misses > 5


@pytest.mark.parametrize(("task", "first", "second"), [("probe", [1, 1, 1], []), ("late", [1, 1, 1], [1])])
def test_a_second_question_computes_only_the_rest(
    tiny: Backbone, store: AdapterStore, blocks: list[int], task: str, first: list[int], second: list[int]
) -> None:
    engine, cache = cached(tiny, store)
    engine.predict([(task, picture(1))])
    assert blocks == first and (cache.hits, cache.misses) == (0, 1)
    blocks.clear()
    engine.predict([(task, picture(1).clone())])
    assert blocks == second and (cache.hits, cache.misses) == (1, 1)


def test_only_new_images_of_a_batch_are_computed(tiny: Backbone, store: AdapterStore, blocks: list[int]) -> None:
    engine, _ = cached(tiny, store)
    engine.predict([("late", picture(seed)) for seed in range(3)])
    blocks.clear()
    engine.predict([("late", picture(seed)) for seed in range(5)])
    assert blocks == [2, 2, 5]


def test_what_normalises_an_image_is_part_of_it(tiny: Backbone, store: AdapterStore) -> None:
    engine, cache = cached(tiny, store)
    engine.predict([("probe", picture(1)), ("grey", picture(1))])
    assert cache.misses == 2


def test_memory_is_bounded(tiny: Backbone, store: AdapterStore, blocks: list[int]) -> None:
    """Room for the tokens of one image: the second takes the place of the first. And for none at all."""
    tokens = 4 * tiny.spec.width * (tiny.model.num_prefix_tokens + tiny.model.patch_embed.num_patches)
    engine, cache = cached(tiny, store, tokens + 64)
    plain = Engine(tiny, store)
    for seed in (1, 2, 2, 1):
        check_same(engine.predict([("late", picture(seed))]), plain.predict([("late", picture(seed))]))
        assert cache.used <= tokens + 64
    assert (cache.hits, cache.misses) == (1, 3)
    engine, cache = cached(tiny, store, 16)
    check_same(engine.predict([("late", picture(1))] * 2), plain.predict([("late", picture(1))] * 2))
    assert cache.used == 0


def test_a_server_has_it_when_it_is_told(tiny: Backbone, tmp_path: Path) -> None:
    from gpt_serve.engine.build import build_engine

    store = AdapterStore(tmp_path)
    assert isinstance(build_engine(tiny, store).forward, TorchForward)
    forward = build_engine(tiny, store, trunk_cache_bytes=1000).forward
    assert isinstance(forward, trunks.CachedForward) and forward.cache._kept.maxsize == 1000
