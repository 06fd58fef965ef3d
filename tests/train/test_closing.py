"""Gates that close: exactly 0, chosen on validation images alone, and never at the adapter's expense."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import FILE_NAME, AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.errors import BackboneMismatch, DataError, UnknownTask, UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.batch import AdapterBatch
from gpt_serve.train import calibration, loop
from gpt_serve.train.answers import Answers, predict_all
from gpt_serve.train.closing import close as closing
from gpt_serve.train.closing import search as gate_search
from gpt_serve.train.closing.close import ClosingJob, close_gates
from gpt_serve.train.closing.search import GateSearch, closed, most
from gpt_serve.train.data.datasets import open_dataset
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import Score, Trainer, evaluate
from gpt_serve.train.methods.prompts import AdapterModule
from gpt_serve.train.recipes.recipe import Optimizer, make_recipe
from tests.tiny_vit import PREPROCESS, random_images, random_tensors, tiny_backbone
from tests.train.conftest import Recorder

RECIPE = make_recipe("adamw", prompts=3, epochs=2, warmup=0, batch_size=8)
GATES = 5


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def deep_enough() -> Backbone:
    """A tiny backbone of six blocks, so that five gates can close."""
    return tiny_backbone(depth=GATES + 1)


@pytest.fixture(scope="module")
def trained(deep_enough: Backbone, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one gated adapter for the colours."""
    adapters = tmp_path_factory.mktemp("trained")
    train_adapter(deep_enough, TrainingJob("colours", str(colours), adapters, RECIPE), Recorder(), World())
    return adapters


@pytest.fixture
def adapters(trained: Path, tmp_path: Path) -> Path:
    """A store of the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "adapters"))


def stored(adapters: Path) -> Adapter:
    return AdapterStore(adapters).load("colours").adapter


def republish(adapters: Path, **changes: Any) -> None:
    AdapterStore(adapters).publish(dataclasses.replace(stored(adapters), **changes))


def file_of(adapters: Path) -> bytes:
    return (adapters / "colours" / FILE_NAME).read_bytes()


def same_but_calibrated(old: Adapter, new: Adapter) -> bool:
    """Whether the heads are the same but for one factor."""
    scale = new.head_bias[0] / old.head_bias[0]
    return torch.allclose(scale * old.head_weight, new.head_weight) and torch.allclose(
        scale * old.head_bias, new.head_bias
    )


def pretend(monkeypatch: pytest.MonkeyPatch, score: Callable[[set[int]], Score]) -> list[tuple[int, ...]]:
    """Make the validation score depend on the closed gates alone; returns the list of what is fine-tuned."""

    def stand_in(_: Backbone, module: AdapterModule, *__: Any) -> Score:
        assert module.closed is not None
        return score({gate for gate, shut in enumerate(module.closed) if shut})

    monkeypatch.setattr(gate_search, "evaluate", stand_in)
    monkeypatch.setattr(loop, "evaluate", stand_in)
    tuned: list[tuple[int, ...]] = []
    fine_tune = GateSearch.fine_tune
    monkeypatch.setattr(
        GateSearch, "fine_tune", lambda self, gates: (tuned.append(tuple(gates)), fine_tune(self, gates))[1]
    )
    return tuned


def budget(limit: int) -> Callable[[set[int]], Score]:
    """Gate 4 costs the least and gate 0 the most; accuracy falls when more than ``limit`` gates are closed."""
    return lambda shut: Score(0.9 if len(shut) <= limit else 0.8, 1.0 + sum(GATES - gate for gate in shut))


@pytest.mark.parametrize("limit", [0, 1, 3, 5])
def test_as_many_gates_close_as_validation_allows_and_the_cheapest_do(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    tuned = pretend(monkeypatch, budget(limit))
    before = file_of(adapters)
    summary = close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, epochs=1), Recorder())
    expected = list(range(GATES - limit + 1, GATES + 1))
    assert summary["closing"]["closed"] == expected and isinstance(summary["closing"]["seconds"], float)
    assert len(tuned) <= gate_search.TRIES and tuned[0] == (4, 3, 2, 1, 0)
    gamma = stored(adapters).gamma
    assert gamma is not None
    assert [index + 1 for index, value in enumerate(gamma.tolist()) if value == -torch.inf] == expected
    assert (file_of(adapters) == before) == (limit == 0)
    assert summary["revision"] == AdapterStore(adapters).load("colours").revision


def test_a_tolerance_allows_worse_accuracy_up_to_that_many_points(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, budget(1))
    job = ClosingJob("colours", str(colours), adapters, epochs=1, tolerance=9.9)
    assert close_gates(deep_enough, job, Recorder())["closing"]["closed"] == [5]
    job = dataclasses.replace(job, tolerance=10.0)
    pretend(monkeypatch, lambda shut: Score(0.9 if len(shut) <= 1 else 0.8, 1.0))
    assert close_gates(deep_enough, job, Recorder())["closing"]["closed"] == [1, 2, 3, 4]


def test_a_fine_tune_keeps_the_most_accurate_epoch_whatever_the_adapter_was_trained_by(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = stored(adapters).training
    republish(adapters, training=training | {"recipe": training["recipe"] | {"select": "loss"}})
    pretend(monkeypatch, lambda shut: Score(0.8 if shut else 0.9, 1.0))
    epochs = iter([Score(0.9, 3.0), Score(0.8, 0.5)])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(epochs))
    summary = close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, epochs=2), Recorder())
    assert summary["closing"]["closed"] == [1, 2, 3, 4, 5] and summary["closing"]["best_epoch"] == 1


@pytest.mark.parametrize(("low", "high", "limit"), [(0, 23, 23), (0, 23, 0), (3, 11, 3), (0, 11, 7), (11, 11, 11)])
def test_the_search_tries_the_most_first_then_halves(low: int, high: int, limit: int) -> None:
    asked: list[int] = []

    def attempt(count: int) -> int | None:
        asked.append(count)
        return count if count <= limit else None

    assert most(low, high, attempt, tries=10) == (limit if limit > low else None)
    assert asked[:1] == ([high] if low < high else [])
    assert len(asked) <= 6
    all_asked = list(asked)
    asked.clear()
    most(low, high, attempt, tries=2)
    assert asked == all_asked[:2]


def test_the_published_adapter_is_the_module_that_was_chosen(
    deep_enough: Backbone, colours: Path, adapters: Path
) -> None:
    before = stored(adapters)
    summary = close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, tolerance=100.0), Recorder())
    after, step = stored(adapters), summary["closing"]
    assert after.gamma is not None and torch.sigmoid(after.gamma).tolist() == [0] * GATES
    assert step["closed"] == [1, 2, 3, 4, 5] and step["best_epoch"] > 0
    assert AdapterBatch.of(after, deep_enough.spec, "cpu").layout.closed == (True,) * GATES
    dataset = open_dataset(str(colours), 0)
    for split, name in ((dataset.val, "val_accuracy"), (dataset.test, "test_accuracy")):
        view = View(split, PREPROCESS, None, "none", 0)
        for adapter, value in zip((before, after), step[name], strict=True):
            module = AdapterModule.of(adapter, deep_enough.spec, 0.0)
            assert evaluate(deep_enough, module, view, Inputs(0)).accuracy == pytest.approx(value)
        assert after.training["metrics"][name] == summary["metrics"][name] == step[name][1]


def test_the_file_and_the_card_tell_what_closed_and_what_it_cost(
    deep_enough: Backbone, colours: Path, adapters: Path
) -> None:
    old = stored(adapters)
    summary = close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, tolerance=100.0), Recorder())
    new = stored(adapters)
    assert new.training["closing"] == [summary["closing"]]
    assert {key: new.training[key] for key in ("recipe", "data")} == {
        key: old.training[key] for key in ("recipe", "data")
    }
    told = (adapters / "colours" / "README.md").read_text()
    step = summary["closing"]
    for text in (
        f"| revision | `{summary['revision']}` |",
        "5 of 5 open gates were closed (blocks 1, 2, 3, 4, 5) after fine-tuning",
        "at most 100 points",
        "| test accuracy | {:.2f} % | {:.2f} % |".format(*(100 * value for value in step["test_accuracy"])),
        "| 1 | closed |",
    ):
        assert text in told, text


def test_test_images_select_nothing(
    deep_enough: Backbone, colours: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(adapters, tmp_path / "other"))
    seen: set[str] = set()

    def watched(backbone: Backbone, module: AdapterModule, view: View, *rest: Any) -> Score:
        seen.update(sample.name for sample in view.samples)
        return evaluate(backbone, module, view, *rest)

    monkeypatch.setattr(gate_search, "evaluate", watched)
    monkeypatch.setattr(loop, "evaluate", watched)
    good = close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, tolerance=100.0), Recorder())
    assert seen == {sample.name for sample in open_dataset(str(colours), 0).val}

    def wrong(*args: Any) -> Answers:
        answers = predict_all(*args)
        return dataclasses.replace(answers, predictions=(answers.targets + 1) % 3)

    monkeypatch.setattr(closing, "predict_all", wrong)
    monkeypatch.setattr(calibration, "predict_all", wrong)
    bad = close_gates(deep_enough, ClosingJob("colours", str(colours), other, tolerance=100.0), Recorder())
    assert bad["closing"]["test_accuracy"] == [0, 0] != good["closing"]["test_accuracy"]
    assert bad["closing"]["tried"] == good["closing"]["tried"]
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(stored(adapters), name), getattr(stored(other), name)), name


def test_negligible_gates_close_without_fine_tuning(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    republish(adapters, gamma=torch.full((GATES,), -30.0))
    old = stored(adapters)
    monkeypatch.setattr(GateSearch, "fine_tune", lambda *_: pytest.fail("nothing needs to be fine-tuned"))
    step = close_gates(deep_enough, ClosingJob("colours", str(colours), adapters), Recorder())["closing"]
    assert (step["closed"], step["epochs"], step["best_epoch"]) == ([1, 2, 3, 4, 5], 0, 0)
    new = stored(adapters)
    assert same_but_calibrated(old, new) and new.gamma is not None and new.gamma.isneginf().all()
    assert "closed (blocks 1, 2, 3, 4, 5) without fine-tuning" in (adapters / "colours" / "README.md").read_text()


def test_a_fine_tune_that_only_harms_is_undone(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "evaluate", lambda *_: Score(0.0, 9.0))
    old = stored(adapters)
    step = close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, tolerance=100.0), Recorder())[
        "closing"
    ]
    assert (step["closed"], step["best_epoch"]) == ([1, 2, 3, 4, 5], 0)
    assert same_but_calibrated(old, stored(adapters))


def test_a_second_step_goes_on_from_the_first(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ClosingJob("colours", str(colours), adapters, epochs=1)
    pretend(monkeypatch, budget(2))
    close_gates(deep_enough, job, Recorder())
    pretend(monkeypatch, budget(4))
    second = close_gates(deep_enough, job, Recorder())["closing"]
    assert (second["closed"], second["open_before"]) == ([2, 3], 3)
    after = stored(adapters)
    assert after.gamma is not None and after.gamma.isneginf().tolist() == [False, True, True, True, True]
    assert [step["closed"] for step in after.training["closing"]] == [[4, 5], [2, 3]]
    assert (adapters / "colours" / "README.md").read_text().count("## Closed gates") == 2


@pytest.mark.parametrize("infinite", [-torch.inf, torch.inf])
@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 0.0), ("sgd", 0.1), ("adamw", 0.1)])
def test_gates_that_are_fixed_do_not_move_and_the_others_do(
    tiny: Backbone, colours: Path, optimizer: Optimizer, decay: float, infinite: float
) -> None:
    tensors = random_tensors("gated", 3, 24, prompts=3) | {"gamma": torch.tensor([0.5, infinite])}
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, weight_decay=decay, momentum=0.9, lr=0.02)
    module = AdapterModule(tiny.spec, nn.Linear(24, 3), **tensors, prompt_dropout=0.1)
    view = View(open_dataset(str(colours), 0).train[::3], PREPROCESS, None, "none", 0)
    Trainer(tiny, module, recipe, train=view, val=view, world=World(), inputs=Inputs(0)).fit(
        lambda *_: None, lambda _: None
    )
    gamma = module.stored()["gamma"]
    assert gamma[1] == infinite and gamma[0] != 0.5
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_training_computes_no_prompt_rows_behind_closed_gates(tiny: Backbone) -> None:
    tensors = random_tensors("gated", 3, 24, prompts=7) | {"gamma": torch.tensor([-torch.inf, 1.0])}
    module = AdapterModule(tiny.spec, nn.Linear(24, 3), **tensors)
    rows: list[int] = []
    hooks = [
        block.mlp.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
        for block in tiny.model.blocks
    ]
    module(tiny.model, random_images(2)).sum().backward()
    for hook in hooks:
        hook.remove()
    assert rows == [17, 24, 24]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("moment", ["fine-tuning", "publishing"])
def test_an_interrupted_step_leaves_the_adapter_as_it_was(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()}
    if moment == "publishing":

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("gpt_serve.adapters.folder.os.replace", interrupt)
    recorder = Recorder(interrupt_at=0 if moment == "fine-tuning" else None)
    with pytest.raises(KeyboardInterrupt):
        close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, tolerance=100.0), recorder)
    assert {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()} == before


def test_an_adapter_that_was_replaced_meanwhile_is_not_overwritten(
    deep_enough: Backbone, colours: Path, adapters: Path
) -> None:
    class Rival(Recorder):
        def training(self, *_: int) -> None:
            republish(adapters, created="2026-01-01T00:00:00Z")

    with pytest.raises(UsageError, match="was replaced while its gates were closed: repeat the command"):
        close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, tolerance=100.0), Rival())
    assert stored(adapters).created == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": None, "method": "vpt-shallow"}, r"learns no gates \(method vpt-shallow\)"),
        ({"gamma": torch.full((GATES,), -torch.inf)}, "all gates of adapter 'colours' are closed already"),
        ({"training": {}}, "does not tell how it was trained"),
        ({"training": {"recipe": 3, "data": [], "metrics": None}}, "does not tell how it was trained"),
    ],
)
def test_an_adapter_that_cannot_be_closed_is_refused_before_the_data_is_read(
    deep_enough: Backbone, adapters: Path, changes: dict[str, Any], message: str
) -> None:
    republish(adapters, **changes)
    with pytest.raises(UsageError, match=message):
        close_gates(deep_enough, ClosingJob("colours", "no such folder", adapters), Recorder())


def test_other_data_another_backbone_and_unreadable_images_are_refused(
    deep_enough: Backbone, colours: Path, adapters: Path, tmp_path: Path
) -> None:
    job = ClosingJob("colours", str(colours), adapters)
    with pytest.raises(BackboneMismatch, match="'colours' is refused: trained on backbone tiny"):
        close_gates(tiny_backbone(depth=4), job, Recorder())
    with pytest.raises(UnknownTask):
        close_gates(deep_enough, dataclasses.replace(job, task="nobody"), Recorder())
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    (data / "train/red/3.png").write_bytes(b"not an image")
    job = dataclasses.replace(job, data=str(data))
    with pytest.raises(DataError, match="1 of 42 images cannot be read"):
        close_gates(deep_enough, job, Recorder())
    with pytest.raises(DataError, match="is not what 'colours' was trained on"):
        close_gates(deep_enough, dataclasses.replace(job, skip_unreadable=True), Recorder())


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"tolerance": float("nan")}, "--tolerance"), ({"tolerance": -1}, "--tolerance"), ({"epochs": 0}, "--epochs")],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag(
    deep_enough: Backbone, colours: Path, adapters: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"{message} must lie between"):
        close_gates(deep_enough, ClosingJob("colours", str(colours), adapters, **setting), Recorder())


def test_closing_leaves_the_other_gates_alone(trained: Path) -> None:
    adapter = stored(trained)
    shut = closed(adapter, [1, 3])
    assert adapter.gamma is not None and shut.gamma is not None and adapter.gamma.isfinite().all()
    assert shut.gamma.isneginf().tolist() == [False, True, False, True, False]
    assert torch.equal(shut.gamma[::2], adapter.gamma[::2])
    assert closed(adapter, []).gamma.tolist() == adapter.gamma.tolist()  # type: ignore[union-attr]


# The command line


def run(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, *args: object) -> Result:
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: backbone)
    return CliRunner(catch_exceptions=False).invoke(main, [str(arg) for arg in args], prog_name="gpt-serve")


def test_close_gates_prints_one_line_or_one_object(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("close-gates", "--task", "colours", "--data", colours, "--adapters", adapters, "--epochs", 1)
    pretend(monkeypatch, lambda shut: Score(1.0 if not shut else 0.5, 1.0))
    revision = AdapterStore(adapters).load("colours").revision
    result = run(deep_enough, monkeypatch, *options)
    assert (result.exit_code, result.stdout) == (
        0,
        f"colours: no gate can close with validation accuracy within 0 points of 100.0 %; revision {revision} stays\n",
    )
    pretend(monkeypatch, budget(2))
    value = json.loads(run(deep_enough, monkeypatch, *options, "--json").stdout)
    assert value["closing"]["closed"] == [4, 5] and value["revision"] != revision
    pretend(monkeypatch, budget(3))
    line = run(deep_enough, monkeypatch, *options).stdout
    assert line.startswith(
        "colours: closed 1 of 3 open gates (blocks 3); validation accuracy 90.0 % before, 90.0 % after; "
    )
    assert line.count("\n") == 1


def test_train_closes_gates_afterwards(
    deep_enough: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, budget(GATES))
    options = ("train", "--task", "colours", "--data", colours, "--adapters", tmp_path, "--epochs", 1, "--close-gates")
    value = json.loads(run(deep_enough, monkeypatch, *options, "--json").stdout)
    found = AdapterStore(tmp_path).load("colours")
    assert value["revision"] == found.revision and value["closing"] == found.adapter.training["closing"]
    assert found.adapter.gamma is not None and found.adapter.gamma.isneginf().all()
    result = run(deep_enough, monkeypatch, *options, "--method", "vpt-deep")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and "learns no gates" in result.stderr


def test_an_interrupted_step_says_how_to_go_on(
    deep_enough: Backbone, colours: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GateSearch, "run", interrupt)
    result = run(
        deep_enough, monkeypatch, "close-gates", "--task", "colours", "--data", colours, "--adapters", adapters
    )
    assert (result.exit_code, result.stdout) == (130, "")
    assert "run gpt-serve close-gates" in result.stderr
