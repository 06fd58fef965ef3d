import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.engine.classify import Prediction
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import DataError, InvalidTaskName, UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train import fit
from gpt_serve.train.data.datasets import Dataset, open_dataset
from gpt_serve.train.data.views import View, shuffled_batches
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, load_views, train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import Score, Trainer, forward_logits
from gpt_serve.train.methods.modules import TaskModule
from gpt_serve.train.methods.prompts import METHODS
from gpt_serve.train.recipes.recipe import Select, learning_rate, make_recipe
from tests.tiny_vit import PREPROCESS, tiny_backbone
from tests.train.conftest import Recorder

RECIPE = make_recipe("paper", prompts=3, gate_init=1.0, epochs=8, warmup=1, lr=0.02, batch_size=8)


def job(data: Path, adapters: Path, **changes: object) -> TrainingJob:
    return dataclasses.replace(TrainingJob("colours", str(data), adapters, RECIPE), **changes)  # type: ignore[arg-type]


def train(backbone: Backbone, work: TrainingJob, recorder: Recorder | None = None) -> dict[str, object]:
    summary = train_adapter(backbone, work, recorder or Recorder(), World())
    assert summary is not None
    return summary


@pytest.mark.parametrize("method", ["gated", "vpt-shallow", "vpt-deep", "linear"])
def test_every_method_learns_publishes_and_predicts(tiny: Backbone, colours: Path, tmp_path: Path, method: str) -> None:
    work = job(colours, tmp_path, recipe=dataclasses.replace(RECIPE, method=method))
    summary = train(tiny, work)
    assert summary["metrics"]["test_accuracy"] >= 0.75  # type: ignore[index]
    engine = Engine(tiny, AdapterStore(tmp_path))
    samples = open_dataset(str(colours), 0).test
    results = engine.predict([("colours", sample.read()) for sample in samples])
    right = 0
    for sample, result in zip(samples, results, strict=True):
        assert isinstance(result, Prediction)
        assert result.revision == summary["revision"]
        right += result.labels.index(result.top(1)[0][0]) == sample.target
    # The served adapter is the one whose accuracy was reported.
    assert right / len(samples) == summary["metrics"]["test_accuracy"]  # type: ignore[index]


PARAMETERS: dict[str, tuple[dict[str, Any], int]] = {
    "gated": ({"method": "gated"}, 3 * 24 + 2 + 3 + 25 * 3),
    "gated, hard": ({"method": "gated", "gate": "hard"}, 3 * 24 + 2 + 3 + 25 * 3),
    "gated without temperatures": ({"method": "gated", "temperature": False}, 3 * 24 + 2 + 25 * 3),
    "gated-deep": ({"method": "gated-deep"}, 3 * 3 * 24 + 2 + 3 + 25 * 3),
    "vpt-shallow": ({"method": "vpt-shallow"}, 3 * 24 + 25 * 3),
    "vpt-deep": ({"method": "vpt-deep"}, 3 * 3 * 24 + 25 * 3),
    "spt-shallow": ({"method": "spt-shallow"}, 3 * 24 + 25 * 3),
    "spt-deep": ({"method": "spt-deep"}, 3 * 3 * 24 + 25 * 3),
    "linear": ({"method": "linear"}, 25 * 3),
    "bias": ({"method": "bias"}, 3 * 3 * 24 + 25 * 3),
    # Patch embedding, CLS, positions, blocks (qkv, projection, MLP, two norms), the last norm, head.
    "full": (
        {"method": "full"},
        49 * 24 + 24 + 17 * 24 + 3 * (25 * 72 + 25 * 24 + 25 * 96 + 97 * 24 + 4 * 24) + 2 * 24 + 25 * 3,
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_trainable_parameters_follow_the_formula(tiny: Backbone, name: str) -> None:
    settings, expected = PARAMETERS[name]
    module = build_module(tiny, dataclasses.replace(RECIPE, **settings), 3)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected
    plain = {name for name in METHODS if not name.endswith("+shift")}
    assert {settings["method"] for settings, _ in PARAMETERS.values()} == plain


def test_the_recorded_number_of_parameters_is_the_modules(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, warmup=0)
    assert train(tiny, job(colours, tmp_path, recipe=recipe))["trainable_parameters"] == PARAMETERS["gated"][1]


def test_the_same_seed_gives_the_same_adapter_and_another_seed_does_not(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny, job(colours, tmp_path / name, recipe=dataclasses.replace(RECIPE, epochs=2, seed=seed)))
        heads.append(AdapterStore(tmp_path / name).load("colours").adapter.head_weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_interrupted_run_resumes_to_the_very_same_adapter(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    train(tiny, job(colours, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(tiny, job(colours, tmp_path / "parts"), Recorder(interrupt_at=5))
    assert AdapterStore(tmp_path / "parts").tasks() == []
    recorder = Recorder()
    train(tiny, job(colours, tmp_path / "parts", resume=True), recorder)
    assert [record.epoch for record in recorder.epochs] == [5, 6, 7]
    whole, parts = (AdapterStore(tmp_path / name).load("colours").adapter for name in ("whole", "parts"))
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert not (tmp_path / "parts" / ".train" / "colours").exists()


def test_resume_refuses_other_settings_and_a_missing_or_damaged_run(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="nothing to resume"):
        train(tiny, job(colours, tmp_path, resume=True))
    with pytest.raises(KeyboardInterrupt):
        train(tiny, job(colours, tmp_path), Recorder(interrupt_at=1))
    other = dataclasses.replace(RECIPE, lr=0.5)
    with pytest.raises(UsageError, match=r"lr was 0.02 and is 0.5"):
        train(tiny, job(colours, tmp_path, resume=True, recipe=other))
    with pytest.raises(UsageError, match=r"pool was mean and is cls"):
        train(tiny_backbone(pool="cls"), job(colours, tmp_path, resume=True))
    (tmp_path / ".train" / "colours" / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(UsageError, match="is damaged"):
        train(tiny, job(colours, tmp_path, resume=True))


def test_unreadable_images_are_listed_by_path_before_anything_trains(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(colours, data)
    bad = [data / "train/red/3.png", data / "test/blue/0.png"]
    bad[0].write_bytes(b"not an image")
    bad[1].write_bytes(bad[1].read_bytes()[:60])
    recorder = Recorder()
    with pytest.raises(DataError, match="2 of 42 images cannot be read"):
        train(tiny, job(data, tmp_path / "adapters"), recorder)
    assert [image.name for image in recorder.bad] == [str(path) for path in bad]
    assert recorder.epochs == []
    assert not (tmp_path / "adapters" / ".train" / "colours").exists()
    summary = train(tiny, job(data, tmp_path / "adapters", skip_unreadable=True))
    counts = summary["data"]
    assert (counts["train"] + counts["val"], counts["test"]) == (29, 11)  # type: ignore[index]


def test_a_class_without_readable_images_is_refused(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(colours, data)
    for path in (data / "train/red").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="no readable images are left for red"):
        train(tiny, job(data, tmp_path / "adapters", skip_unreadable=True))


def test_a_loss_that_is_not_finite_ends_in_one_line(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gpt_serve.train.loop.forward_logits",
        lambda _, module, images, preprocess: module.head.bias.expand(len(images), -1) * torch.inf,
    )
    with pytest.raises(DataError, match=r"not finite in epoch 0: lower --lr"):
        train(tiny, job(colours, tmp_path))
    assert AdapterStore(tmp_path).tasks() == []


def test_a_name_that_is_not_allowed_is_refused_first(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskName):
        train(tiny, job(tmp_path / "missing", tmp_path, task="../x"))


def test_the_best_epoch_is_chosen_on_validation_and_recorded(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    summary = train(tiny, job(colours, tmp_path), recorder)
    best = max(recorder.epochs, key=lambda record: (record.val_accuracy, -record.val_loss))
    metrics = summary["metrics"]
    assert metrics["best_epoch"] == best.epoch  # type: ignore[index]
    assert metrics["val_accuracy"] == best.val_accuracy  # type: ignore[index]
    stored = AdapterStore(tmp_path).load("colours").adapter.training
    assert stored["metrics"] == metrics
    assert stored["recipe"] == RECIPE.to_dict()


@pytest.mark.parametrize(("select", "best"), [("accuracy", 2), ("loss", 5)])
def test_the_best_epoch_is_published_not_the_last(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: Select, best: int
) -> None:
    heads: list[Tensor] = []

    def evaluate(_: Backbone, module: TaskModule, *__: object) -> Score:
        heads.append(module.head.weight.detach().clone())
        epoch = len(heads) - 1
        return Score([0.2, 0.5, 0.9, 0.9, 0.4, 0.8, 0.7, 0.6][epoch], [9.0, 8.0, 6.0, 7.0, 5.0, 4.0, 4.0, 6.0][epoch])

    monkeypatch.setattr("gpt_serve.train.loop.evaluate", evaluate)
    work = dataclasses.replace(job(colours, tmp_path), recipe=dataclasses.replace(RECIPE, select=select))
    assert train(tiny, work)["metrics"]["best_epoch"] == best  # type: ignore[index]
    published = AdapterStore(tmp_path).load("colours").adapter.head_weight
    published /= published.norm()  # calibration scales it
    same = [torch.allclose(published, head / head.norm(), atol=1e-6) for head in heads]
    assert same == [epoch == best for epoch in range(8)]


def test_training_images_are_augmented_and_no_others(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    views = load_views(open_dataset(str(colours), 0), PREPROCESS, job(colours, tmp_path), Recorder())
    assert views.test is not None
    for view, augmented in ((views.train, True), (views.val, False), (views.test, False)):
        first = [view[index][0] for index in range(len(view))]
        view.epoch = 1
        second = [view[index][0] for index in range(len(view))]
        assert any(not torch.equal(one, other) for one, other in zip(first, second, strict=True)) is augmented


def test_splits_share_the_room_for_scaled_images(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(room: int) -> list[bool]:
        monkeypatch.setattr(fit, "CACHE_BYTES", room)
        views = load_views(open_dataset(str(colours), 0), PREPROCESS, job(colours, tmp_path), Recorder())
        assert views.test is not None
        return [view.scaled is not None for view in (views.train, views.val, views.test)]

    views = load_views(open_dataset(str(colours), 0), PREPROCESS, job(colours, tmp_path), Recorder())
    assert views.train.scaled is not None and views.val.scaled is not None
    train, val = (sum(image.numel() for image in images) for images in (views.train.scaled, views.val.scaled))
    assert cached(train + val) == [True, True, False]
    assert cached(train - 1) == [False, True, True]


def test_nothing_is_selected_on_test_images(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """Test images under wrong labels change the reported test accuracy and nothing else."""
    wrong = tmp_path / "wrong"
    shutil.copytree(colours, wrong)
    (wrong / "test/blue").rename(wrong / "test/other")
    (wrong / "test/red").rename(wrong / "test/blue")
    (wrong / "test/other").rename(wrong / "test/red")
    summaries, adapters = [], []
    for name, data in (("right", colours), ("wrong", wrong)):
        summaries.append(train(tiny, job(data, tmp_path / name)))
        adapters.append(AdapterStore(tmp_path / name).load("colours").adapter)
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(adapters[0], name), getattr(adapters[1], name)), name
    right, mixed = (summary["metrics"] for summary in summaries)
    assert right["test_accuracy"] > mixed["test_accuracy"]  # type: ignore[index]
    assert right["val_accuracy"] == mixed["val_accuracy"]  # type: ignore[index]


def test_the_card_tells_metrics_gates_and_data(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    summary = train(tiny, job(colours, tmp_path))
    folder = tmp_path / "colours"
    card = (folder / "README.md").read_text()
    for text in (
        str(summary["revision"]),
        "| test accuracy |",
        "| selection ratio |",
        "| 3 | - |",
        "| gate_init | 1.0 |",
    ):
        assert text in card
    for name in ("gates.png", "confusion.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_frozen_weights_do_not_move(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    train(tiny, job(colours, tmp_path))
    assert all(torch.equal(before[key], value) for key, value in tiny.model.state_dict().items())
    assert all(weight.grad is None for weight in tiny.model.parameters())


@pytest.mark.parametrize("name", ["adamw", "paper"])
def test_the_first_steps_follow_the_optimizer_of_the_recipe(tiny: Backbone, colours: Path, name: str) -> None:
    """Five steps of the loop against plain tensors and the textbook update."""
    recipe = make_recipe(name, prompts=3, prompt_dropout=0.0, epochs=3, warmup=1, lr=0.003, batch_size=6)
    dataset = open_dataset(str(colours), 0)
    module = build_module(tiny, recipe, 3)
    expected = {key: value.detach().clone() for key, value in module.named_parameters()}
    view = View(dataset.train[:15], PREPROCESS, None, "none", 0)
    trainer = Trainer(tiny, module, recipe, train=view, val=view, world=World(), inputs=Inputs(0))
    trainer.fit(lambda *_: None, lambda _: None)

    slot: dict[str, Any] = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in expected.items()}
    reference = build_module(tiny, recipe, 3)
    step = 0
    for epoch in range(3):
        for batch in shuffled_batches(15, 6, 0, epoch):
            step += 1
            reference.load_state_dict(expected)
            images = torch.stack([view[index][0] for index in batch])
            targets = torch.tensor([view[index][1] for index in batch])
            loss = F.cross_entropy(forward_logits(tiny, reference, images, PREPROCESS), targets)
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            for (key, value), gradient in zip(list(expected.items()), gradients, strict=True):
                rate = learning_rate(recipe, epoch) * (recipe.head_lr_scale if key.startswith("head") else 1)
                first, second = slot[key]
                if name == "paper":
                    slot[key] = (first := 0.9 * first + gradient, second)
                    expected[key] = value - rate * first
                else:
                    slot[key] = (first := 0.9 * first + 0.1 * gradient, second := 0.999 * second + 0.001 * gradient**2)
                    update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                    expected[key] = value - rate * (update + 0.01 * value)
            if "tau" in expected:
                expected["tau"].clamp_(0.01, 10)
    for key, value in module.named_parameters():
        torch.testing.assert_close(value.detach(), expected[key], atol=2e-5, rtol=1e-4, msg=key)


def test_a_folder_that_cannot_be_written_is_known_before_training(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / ".train").symlink_to("/proc")  # a folder that even root cannot write to
    with pytest.raises(UsageError, match=r"\.train cannot be made or written to: "):
        train(tiny, job(colours, tmp_path / "held"), recorder)
    (tmp_path / "adapters").write_text("a file in the way")
    with pytest.raises(UsageError, match=r"cannot be made or written to: (Not a directory|File exists)"):
        train(tiny, job(colours, tmp_path / "adapters"), recorder)
    assert recorder.epochs == []


def test_temperatures_stay_within_their_range(tiny: Backbone, colours: Path) -> None:
    recipe = make_recipe("adamw", prompts=2, epochs=2, warmup=0, batch_size=8, lr=15.0)
    view = View(open_dataset(str(colours), 0).train[::3], PREPROCESS, None, "none", 0)
    module = build_module(tiny, recipe, 3)
    taus: list[float] = []
    trainer = Trainer(tiny, module, recipe, train=view, val=view, world=World(), inputs=Inputs(0))
    trainer.fit(lambda *_: taus.extend(module.tau.tolist()), lambda _: None)  # type: ignore[union-attr]
    assert min(taus) > 0.0099 and max(taus) <= 10
    assert {round(tau, 4) for tau in taus} & {0.01, 10.0}


def test_what_could_not_be_stored_is_refused_before_images_are_read(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_serve.train.fit.load_views", lambda *_: pytest.fail("images were read"))
    labels = tuple(f"{number:05}" + "x" * 200 for number in range(6000))
    monkeypatch.setattr("gpt_serve.train.fit.open_dataset", lambda *_: Dataset(labels))
    words = r"could not be stored: its header would have 1\.\d+ MiB, 1\.\d+ of them labels, more than the 1 allowed: "
    with pytest.raises(DataError, match=words):
        train(tiny, TrainingJob("many", "data", tmp_path / "adapters", RECIPE))


def test_a_record_too_long_to_store_is_refused_before_images_are_read(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_serve.train.fit.load_views", lambda *_: pytest.fail("images were read"))
    monkeypatch.setattr("gpt_serve.train.fit.open_dataset", lambda *_: Dataset(("a", "b")))
    recipe = make_recipe("adamw", prompts=3, epochs=50_000)
    with pytest.raises(DataError, match="of them training, more than the 1 allowed: take .*, or no --nmi$"):
        train(tiny, TrainingJob("long", "data", tmp_path / "adapters", recipe, nmi=True))
