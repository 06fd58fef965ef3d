"""Heads that read several blocks, shifts, and adapters that are published before the first epoch."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.specs import Tap
from gpt_serve.train import loop
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import Score
from gpt_serve.train.methods.taps import _Search, candidates, parse_taps
from gpt_serve.train.recipes.recipe import make_recipe
from tests.factories import make_adapter
from tests.tiny_vit import tiny_backbone
from tests.train.conftest import Recorder

QUICK = {"epochs": 2, "prompts": 2, "augment": "none", "batch_size": 8}


def train(backbone: Backbone, data: Path, adapters: Path, recipe: str = "lda", **settings: object) -> Recorder:
    recorder = Recorder()
    instant = bool(settings.pop("instant", False))
    job = TrainingJob("colours", str(data), adapters, make_recipe(recipe, **settings), instant=instant)
    assert train_adapter(backbone, job, recorder, World()) is not None
    return recorder


def accuracy_served(backbone: Backbone, data: Path, adapters: Path) -> float:
    """On the test images, by the engine."""
    samples = open_dataset(str(data), 0).test
    with Engine(backbone, AdapterStore(adapters)) as engine:
        results = engine.predict([("colours", sample.read()) for sample in samples])
    assert all(isinstance(result, Prediction) for result in results)
    right = [
        result.labels.index(result.top(1)[0][0]) == sample.target
        for sample, result in zip(samples, results, strict=True)
        if isinstance(result, Prediction)
    ]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "use last, auto, or blocks with a pooling"),
        ("cls:2", "use last, auto, or blocks with a pooling"),
        ("2:max", "use last, auto, or blocks with a pooling"),
        ("3:cls", "the backbone's last block is 2"),
        ("0:mean", "mean counts prompts, after the last block only: use patches"),
        ("1:cls,1:cls", "names a tap twice"),
    ],
)
def test_taps_that_cannot_be(tiny: Backbone, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_taps(text, tiny.spec)


def test_taps_by_name(tiny: Backbone) -> None:
    assert parse_taps("last", tiny.spec) == parse_taps("auto", tiny.spec) == ()
    assert parse_taps("2:mean, 1:cls", tiny.spec) == (Tap(2, "mean"), Tap(1, "cls"))


def test_candidates_are_the_second_half_of_the_blocks() -> None:
    assert candidates(tiny_backbone(depth=4)) == (
        Tap(3, "mean"),
        Tap(3, "cls"),
        Tap(2, "cls"),
        Tap(2, "patches"),
    )
    without = tiny_backbone(depth=2, class_token=False, global_pool="avg")
    assert candidates(without) == (Tap(1, "mean"), Tap(1, "patches"))[:1]
    assert candidates(tiny_backbone(pool="cls"))[:2] == (Tap(2, "cls"), Tap(2, "patches"))


def test_the_search_takes_what_tells_classes_apart_first() -> None:
    """Of four candidates two hold half of what there is to know each, one a noisy copy, one nothing."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(400) % 4
    halves = torch.nn.functional.one_hot(targets // 2, 2).float(), torch.nn.functional.one_hot(targets % 2, 2).float()

    def features(noise: float, kind: int) -> torch.Tensor:
        signal = torch.zeros(400, 2) if kind < 0 else halves[kind]
        return signal + noise * torch.randn(400, 2, generator=generator)

    def split() -> torch.Tensor:
        return torch.stack([features(1, -1), features(0.4, 0), features(2.0, 0), features(0.4, 1)], dim=1)

    chosen = _Search.of(split(), targets, split(), targets, 4).greedy()
    assert sorted(chosen[:2]) == [1, 3] and 2 not in chosen


def test_chosen_taps_are_named_and_the_same_again(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    notices = train(tiny, colours, tmp_path / "one", "instant").notices
    train(tiny, colours, tmp_path / "two", "instant")
    first, second = (AdapterStore(tmp_path / name).load("colours").adapter for name in ("one", "two"))
    assert first.taps == second.taps and torch.equal(first.head_weight, second.head_weight)
    assert any(line.startswith("the head reads ") for line in notices)


@pytest.mark.parametrize("method", ["gated", "linear", "vpt-deep+shift", "bias"])
def test_what_is_served_is_what_was_trained(tiny: Backbone, colours: Path, tmp_path: Path, method: str) -> None:
    settings = {key: value for key, value in QUICK.items() if key != "prompts" or method[0] in "gv"}
    train(tiny, colours, tmp_path, method=method, taps="2:cls,1:patches,0:cls", **settings)
    adapter = AdapterStore(tmp_path).load("colours").adapter
    assert adapter.taps == (Tap(2, "cls"), Tap(1, "patches"), Tap(0, "cls"))
    assert adapter.head_weight.shape == (3, 3 * tiny.spec.width)
    assert adapter.training["metrics"]["test_accuracy"] == accuracy_served(tiny, colours, tmp_path)


@pytest.mark.parametrize("method", ["bias", "gated+shift"])
def test_shifts_are_learned_and_stored(tiny: Backbone, colours: Path, tmp_path: Path, method: str) -> None:
    settings = {"prompts": 2} if method != "bias" else {}
    train(tiny, colours, tmp_path, "adamw", method=method, epochs=3, augment="none", **settings)
    shift = AdapterStore(tmp_path).load("colours").adapter.shift
    assert shift is not None and shift.shape == (3, 3, tiny.spec.width) and (shift != 0).all()


def test_blocks_before_the_first_stay_what_all_tasks_share(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    train(tiny, colours, tmp_path, "adamw", method="gated+shift", first_block=2, **QUICK)
    adapter = AdapterStore(tmp_path).load("colours").adapter
    assert adapter.shift is not None and adapter.tau is not None
    assert not adapter.shift[:2].any() and adapter.shift[2].all()
    assert (adapter.tau[:2] == 1).all() and adapter.tau[2] != 1


def test_instant_trains_nothing(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    recorder = train(tiny, colours, tmp_path, "instant")
    adapter = AdapterStore(tmp_path).load("colours").adapter
    assert not recorder.epochs and adapter.training["metrics"]["best_epoch"] == -1
    assert "none: what training starts from is kept" in (tmp_path / "colours" / "README.md").read_text()
    assert "train_accuracy" not in adapter.training["metrics"]  # nobody measured it
    assert accuracy_served(tiny, colours, tmp_path) >= 0.75
    json.dumps(adapter.training, allow_nan=False)


def test_a_new_task_answers_before_its_first_epoch(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[str] = []
    record = Recorder.batch
    store = AdapterStore(tmp_path)
    monkeypatch.setattr(Recorder, "batch", lambda *args: there.extend(store.tasks()) or record(*args))
    recorder = train(tiny, colours, tmp_path, instant=True, **QUICK)
    assert there and set(there) == {"colours"}
    assert any("published 'colours' as it starts" in line for line in recorder.notices)


def test_an_adapter_that_is_there_stays_until_the_end(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path)
    old = store.publish(make_adapter(tiny.spec, "colours"))
    seen: set[str] = set()
    monkeypatch.setattr(Recorder, "batch", lambda *args: seen.add(store.load("colours").revision))
    train(tiny, colours, tmp_path, instant=True, **QUICK)
    assert seen == {old} and store.load("colours").revision != old


@pytest.mark.parametrize(("losses", "best"), [((0.1, 0.3, 0.2), -1), ((0.3, 0.2, 0.1), 1), ((0.2, 0.1, 0.3), 0)])
def test_the_start_counts_like_an_epoch(
    tiny: Backbone,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, ...],
    best: int,
) -> None:
    scores = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *args: Score(0.5, next(scores)))
    train(tiny, colours, tmp_path, **QUICK)
    metrics = AdapterStore(tmp_path).load("colours").adapter.training["metrics"]
    assert (metrics["best_epoch"], metrics["val_loss"]) == (best, min(losses))


def test_full_fine_tuning_has_no_taps() -> None:
    with pytest.raises(UsageError, match="--method full: leave --norm, --taps and --temperature out"):
        dataclasses.replace(make_recipe("full"), taps="auto")
