"""The sweep with trials that run one after the other in this process; `test_sweep_processes` runs it with real ones."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.errors import DataError, GPTServeError, UsageError
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import train_adapter
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loading import BackboneFacts
from gpt_serve.train.recipes.recipe import Recipe, Select, make_recipe
from gpt_serve.train.sweep import trial as module
from gpt_serve.train.sweep.report import plot_sweep, report_table, told
from gpt_serve.train.sweep.sweep import make_axes, make_grid, run_sweep
from gpt_serve.train.sweep.trial import Sweep, open_study, run_trial
from gpt_serve.train.workers import Submit, ray_workers, shares
from tests.train.conftest import Recorder

RECIPE = make_recipe("adamw", prompts=2, epochs=2, warmup=0, batch_size=8)
AXES = {"lr": [0.0001, 0.02], "gate_init": [1.0, 5.0], "prompts": [2]}


class InProcess:
    """`Workers` without processes; the command is interrupted before trial number ``stop_at``."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.trials = 0
        self.change: Callable[[Sweep], Sweep] = lambda sweep: sweep

    @contextmanager
    def __call__(self, jobs: int | None) -> Iterator[Submit]:
        yield self.submit

    def submit(self, function: Callable[..., Any], sweep: Sweep, *args: Any) -> "Future[Any]":
        if function is run_trial:
            if self.trials == self.stop_at:
                raise KeyboardInterrupt
            self.trials += 1
            sweep = self.change(sweep)
        done: Future[Any] = Future()
        try:
            done.set_result(function(sweep, *args))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture(autouse=True)
def loads_tiny(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trials, too, get the tiny backbone."""
    monkeypatch.setattr(module, "load_backbone", lambda backbone: tiny)
    module._open.cache_clear()
    yield
    module._open.cache_clear()


def plan(
    backbone: Backbone, data: Path, adapters: Path, axes: dict[str, list[Any]] | None = None, **changes: Any
) -> Sweep:
    recipe, axes = dataclasses.replace(RECIPE, **changes), axes or AXES
    facts = BackboneFacts("tiny", None, backbone.spec)
    fixed = tuple((name, tuple(values)) for name, values in axes.items())
    return Sweep(
        TrainingJob("colours", str(data), adapters, recipe), (), facts, fixed, tuple(make_grid(rates(recipe), axes))
    )


def rates(recipe: Recipe) -> Callable[[float], Recipe]:
    """``recipe`` at any rate."""
    return lambda lr: dataclasses.replace(recipe, lr=lr)


def resumed(sweep: Sweep) -> Sweep:
    return dataclasses.replace(sweep, job=dataclasses.replace(sweep.job, resume=True))


def sweep(what: Sweep, workers: InProcess | None = None, recorder: Recorder | None = None) -> Any:
    return run_sweep(what, workers or InProcess(), recorder or Recorder())


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    for trial in report["sweep"]["trials"]:
        del trial["seconds"]
    return report


# what is tried


def test_the_default_rates_are_those_that_the_paper_searched() -> None:
    paper = Path(__file__).parents[3] / "shared" / "papers" / "gated-prompt-tuning-icml2023.txt"
    if not paper.is_file():
        pytest.skip("needs the paper's text in ../shared/papers")
    match = re.search(r"learning rate was searched among \{([^}]*)\}", paper.read_text(encoding="utf-8"))
    assert match is not None
    rates = [float(rate) for rate in match[1].split(",")]
    assert make_axes(make_recipe("paper"), {})["lr"] == rates
    assert make_axes(make_recipe("adamw"), {})["lr"] == pytest.approx([rate / 100 for rate in rates])


def test_beside_a_head_from_lda_the_rate_of_prompts_alone_is_searched() -> None:
    base = make_recipe("lda")
    axes = make_axes(base, {})
    assert axes["lr"] == pytest.approx([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5])
    grid = make_grid(lambda lr: make_recipe("lda", lr=lr), axes | {"gate_init": [1.0], "prompts": [10]})
    assert [recipe.lr * recipe.head_lr_scale for recipe in grid] == pytest.approx([0.002] * 7)
    linear = make_recipe("lda", method="linear")
    assert make_axes(linear, {})["lr"] == make_axes(make_recipe("adamw"), {})["lr"]
    with pytest.raises(UsageError, match="--lr must be above 0"):
        make_grid(lambda lr: make_recipe("lda", lr=lr), {"lr": [0.0]})


def test_default_gates_and_prompts_are_those_of_table_5() -> None:
    axes = make_axes(make_recipe("paper"), {})
    assert axes["gate_init"] == [1, 3, 4, 5, 7, 10, 15, 20] and axes["prompts"] == [1, 5, 10, 100]


@pytest.mark.parametrize(
    ("method", "names"),
    [("gated", ["lr", "gate_init", "prompts"]), ("vpt-deep", ["lr", "prompts"]), ("linear", ["lr"])],
)
def test_methods_have_the_axes_of_what_they_learn(method: str, names: list[str]) -> None:
    axes = make_axes(make_recipe("adamw", method=method), {})
    assert list(axes) == names
    assert all(recipe.method == method for recipe in make_grid(rates(make_recipe("adamw", method=method)), axes))


@pytest.mark.parametrize(
    ("method", "name"), [("vpt-deep", "gate_init"), ("linear", "gate_init"), ("linear", "prompts")]
)
def test_values_for_what_is_not_learned_are_refused(method: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: the method {method} learns no "):
        make_axes(make_recipe("adamw", method=method), {name: [1]})


def test_the_grid_is_every_combination_once() -> None:
    base = make_recipe("adamw", epochs=7)
    axes = make_axes(base, {"lr": (0.1, 0.2, 0.1), "gate_init": (5.0,), "prompts": (3, 4)})
    recipes = make_grid(rates(base), axes)
    assert [(r.lr, r.gate_init, r.prompts) for r in recipes] == [(0.1, 5, 3), (0.1, 5, 4), (0.2, 5, 3), (0.2, 5, 4)]
    assert {dataclasses.replace(r, lr=base.lr, gate_init=base.gate_init, prompts=base.prompts) for r in recipes} == {
        base
    }


def test_samples_are_points_of_the_grid_drawn_by_seed() -> None:
    base = make_recipe("adamw")
    axes = make_axes(base, {})
    grid, some = make_grid(rates(base), axes), make_grid(rates(base), axes, 9)
    assert len(set(some)) == 9 and some == [recipe for recipe in grid if recipe in set(some)]
    assert some == make_grid(rates(base), axes, 9)
    other = make_grid(rates(dataclasses.replace(base, seed=1)), axes, 9)
    assert [r.lr for r in other] != [r.lr for r in some]
    assert make_grid(rates(base), axes, 10_000) == grid


def outcome(accuracy: float, loss: float, status: str = "finished") -> dict[str, Any]:
    measured = {"best_epoch": 1, "val_accuracy": accuracy, "val_loss": loss}
    failure = "boom" if status == "failed" else None
    return {"status": status, "seconds": 1.0, "epochs": 2, **measured, "failure": failure}


@pytest.mark.parametrize(
    ("select", "order"), [("accuracy", ["3", "2", "1", "4", "5"]), ("loss", ["1", "4", "3", "2", "5"])]
)
def test_trials_are_ranked_by_what_epochs_are_selected_by_then_by_order(select: Select, order: list[str]) -> None:
    came_to = [outcome(0.8, 0.1), outcome(0.9, 5.0), outcome(0.9, 0.2), outcome(0.8, 0.1), outcome(1, 0, "failed")]
    trials = [{"lr": lr, **each} for lr, each in enumerate(came_to, 1)]
    rows = report_table({"axes": {"lr": [1, 2, 3, 4, 5]}, "trials": trials}, select)[1]
    assert [row[0] for row in rows] == order and rows[-1][-1] == "failed: boom"


def test_a_trial_that_is_best_before_it_trains_says_so() -> None:
    trial = {"lr": 1} | outcome(0.8, 0.1) | {"best_epoch": -1}
    assert told(trial) == "val 80.0 % (before any epoch), 1 s"
    assert report_table({"axes": {"lr": [1]}, "trials": [trial]}, "loss")[1][0][3] == "before any epoch"
    assert told(outcome(0.8, 0.1)) == "val 80.0 % (epoch 2 of 2), 1 s"


# a sweep


def test_the_published_adapter_is_what_train_gives_with_the_best_recipe(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    report = sweep(plan(tiny, colours, tmp_path / "swept"))
    trials = report["sweep"]["trials"]
    assert [(t["lr"], t["gate_init"], t["prompts"]) for t in trials] == [
        (r.lr, r.gate_init, r.prompts) for r in make_grid(rates(RECIPE), AXES)
    ]
    assert all(t["status"] == "finished" and t["epochs"] == 2 for t in trials)
    chosen = min(trials, key=lambda trial: (-trial["val_accuracy"], trial["val_loss"]))
    assert trials[report["sweep"]["best"]] == chosen and chosen["lr"] == 0.02
    # The trial was that very run: the same seed, images and start.
    assert (chosen["val_accuracy"], chosen["val_loss"]) == (
        report["metrics"]["val_accuracy"],
        report["metrics"]["val_loss"],
    )

    recipe = make_recipe("adamw", **{**report["recipe"]})
    train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path / "trained", recipe), Recorder(), World())
    swept, trained = (AdapterStore(tmp_path / name).load("colours").adapter for name in ("swept", "trained"))
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(swept, name), getattr(trained, name))

    folder = tmp_path / "swept" / "colours"
    assert json.loads((folder / "sweep.json").read_text()) == report
    assert report["revision"] in (folder / "sweep.md").read_text()
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "swept" / ".train" / "colours").exists() and not list(folder.glob(".*"))


def test_the_report_lists_what_all_trials_share(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    what = plan(tiny, colours, tmp_path, {"lr": [0.01, 0.02]}, final_fit=True)
    scaled = tuple(dataclasses.replace(recipe, head_lr_scale=1 / recipe.lr) for recipe in what.recipes)
    shared = sweep(dataclasses.replace(what, recipes=scaled))["sweep"]["shared"]
    assert shared["final_fit"] is False and shared["epochs"] == RECIPE.epochs
    assert "lr" not in shared and "head_lr_scale" not in shared
    assert "| final_fit | False |" in (tmp_path / "colours" / "sweep.md").read_text()


def test_a_final_fit_is_the_winners_alone(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """VTAB-1K's protocol: trials are judged on validation images, and the winner is trained on them, too."""
    what = plan(tiny, colours, tmp_path, {"lr": [0.01, 0.02]}, final_fit=True)
    report = sweep(what)
    assert [recipe.final_fit for recipe in what.recipes] == [False, False]
    assert report["recipe"]["final_fit"] and "val_accuracy" not in report["metrics"]
    assert all(trial["val_accuracy"] > 0 for trial in report["sweep"]["trials"])


@pytest.mark.slow
def test_test_images_play_no_part(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """With their labels exchanged, or without them, the same trial wins with the same figures."""
    wrong, without = tmp_path / "wrong", tmp_path / "without"
    shutil.copytree(colours, wrong)
    (wrong / "test" / "red").rename(wrong / "test" / "spare")
    (wrong / "test" / "blue").rename(wrong / "test" / "red")
    (wrong / "test" / "spare").rename(wrong / "test" / "blue")
    shutil.copytree(colours, without)
    shutil.rmtree(without / "test")
    axes = {"lr": [0.0001, 0.02]}
    plans = [plan(tiny, data, tmp_path / f"a-{data.name}", axes) for data in (colours, wrong, without)]
    reports = [without_seconds(sweep(each)) for each in plans]
    assert reports[0]["sweep"] == reports[1]["sweep"] == reports[2]["sweep"]
    assert reports[0]["metrics"]["test_accuracy"] != reports[1]["metrics"]["test_accuracy"]


def test_an_interrupted_sweep_goes_on_where_it_was(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    whole = sweep(plan(tiny, colours, tmp_path / "whole"))
    what, recorder = plan(tiny, colours, tmp_path / "parts"), Recorder()
    with pytest.raises(KeyboardInterrupt):
        sweep(what, InProcess(stop_at=3), recorder)
    assert recorder.notices[-1] == "3 of 4 trials are done: add --resume to continue"
    assert AdapterStore(tmp_path / "parts").tasks() == []

    with pytest.raises(UsageError, match=r"sweep.jsonl holds an unfinished sweep: add --resume .* or delete the file"):
        sweep(what)
    with pytest.raises(UsageError, match=r"other settings \(epochs was 2 and is 3\)"):
        sweep(resumed(plan(tiny, colours, tmp_path / "parts", epochs=3)))

    workers = InProcess()
    report = sweep(resumed(what), workers)
    assert workers.trials == 1
    assert without_seconds(report)["sweep"] == without_seconds(whole)["sweep"]
    with pytest.raises(UsageError, match="nothing to resume"):
        sweep(resumed(what))


def test_an_interrupt_while_the_best_is_trained_costs_no_epoch(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    what = plan(tiny, colours, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep(what, recorder=Recorder(interrupt_at=1))
    workers, recorder = InProcess(), Recorder()
    sweep(resumed(what), workers, recorder)
    assert workers.trials == 0 and [record.epoch for record in recorder.epochs] == [1]


def test_an_interrupted_training_of_other_settings_is_not_continued(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    what = plan(tiny, colours, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep(what, None, Recorder(interrupt_at=1))
    other = TrainingJob("colours", str(colours), tmp_path, dataclasses.replace(RECIPE, lr=0.3))
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tiny, other, Recorder(interrupt_at=1), World())
    recorder = Recorder()
    report = sweep(resumed(what), None, recorder)
    assert any("an interrupted run of 'colours' is replaced" in notice for notice in recorder.notices)
    assert report["recipe"]["lr"] == 0.02


def test_lists_may_be_longer_than_before_and_failed_trials_run_again(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    few = plan(tiny, colours, tmp_path, {"lr": [0.02], "prompts": [4000, 2]}, prompt_init="tokens")
    with pytest.raises(KeyboardInterrupt):
        sweep(few, recorder=Recorder(interrupt_at=0))
    more = plan(tiny, colours, tmp_path, {"lr": [0.01, 0.02], "prompts": [3999, 4000, 2]}, prompt_init="tokens")
    workers, recorder = InProcess(), Recorder()
    trials = sweep(resumed(more), workers, recorder)["sweep"]["trials"]
    assert workers.trials == 5 and "resuming after 1 of 6 trials" in recorder.notices
    assert [trial["status"] for trial in trials] == ["failed", "failed", "finished"] * 2


def test_hopeless_trials_are_stopped_and_run_again_when_none_are_to_be(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    what = plan(tiny, colours, tmp_path, {"lr": [0.02, 1e-9]}, epochs=4)
    early = dataclasses.replace(what, early_stop=True)
    with pytest.raises(KeyboardInterrupt):
        sweep(early, recorder=Recorder(interrupt_at=0))
    shutil.copytree(tmp_path / ".train", tmp_path / "again" / ".train")
    trials = sweep(resumed(early))["sweep"]["trials"]
    assert [(trial["status"], trial["epochs"]) for trial in trials] == [("finished", 4), ("stopped", 1)]

    again = dataclasses.replace(what, job=dataclasses.replace(what.job, adapters=tmp_path / "again"))
    workers = InProcess()
    trials = sweep(resumed(again), workers)["sweep"]["trials"]
    assert [(trial["status"], trial["epochs"]) for trial in trials] == [("finished", 4)] * 2 and workers.trials == 1


def test_a_command_that_was_killed_is_resumed(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """It leaves trials that seem to wait, or to run."""
    what = plan(tiny, colours, tmp_path)
    what.journal.parent.mkdir(parents=True)
    study = open_study(what)
    for index in (3, 2, 1):
        study.enqueue_trial(what.values(what.recipes[index]), {"index": index, "identity": {}})
    study.ask()
    workers = InProcess()
    trials = sweep(resumed(what), workers)["sweep"]["trials"]
    assert workers.trials == 4 and [trial["status"] for trial in trials] == ["finished"] * 4


def test_a_damaged_journal_is_one_line(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    what = plan(tiny, colours, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep(what, InProcess(stop_at=1))
    what.journal.write_text(what.journal.read_text().replace("identity", '"'))
    with pytest.raises(UsageError, match="is damaged: delete it, and its trials are run again$"):
        sweep(resumed(what))


def test_a_process_that_dies_costs_its_trial_alone(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    class Dies(InProcess):
        def submit(self, function: Callable[..., Any], what: Sweep, *args: Any) -> "Future[Any]":
            if function is run_trial and self.trials == 1:
                self.trials += 1
                open_study(what).ask()  # and no word of it again
                broken: Future[Any] = Future()
                broken.set_exception(BrokenProcessPool("a process was killed"))
                return broken
            return super().submit(function, what, *args)

    trials = sweep(plan(tiny, colours, tmp_path), Dies())["sweep"]["trials"]
    assert [trial["status"] for trial in trials] == ["finished", "failed", "finished", "finished"]
    assert trials[1]["failure"] == "its process died: it may have run out of memory"


def test_processes_that_cannot_begin_are_not_tried_for_ever(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    class Never(InProcess):
        def submit(self, *_: Any) -> "Future[Any]":
            broken: Future[Any] = Future()
            broken.set_exception(BrokenProcessPool("a process was killed"))
            return broken

    with pytest.raises(UsageError, match="no process could begin a trial: a process was killed"):
        sweep(plan(tiny, colours, tmp_path), Never())
    assert not (tmp_path / ".train" / "colours").exists()


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    axes = {"lr": [0.02], "prompts": [4000, 2]}
    what = plan(tiny, colours, tmp_path, axes, prompt_init="tokens")
    report = sweep(what)
    failed, good = report["sweep"]["trials"]
    assert failed["status"] == "failed" and "4000" in failed["failure"] and failed["val_accuracy"] is None
    assert good["status"] == "finished" and report["sweep"]["best"] == 1
    assert report_table(report["sweep"], "accuracy")[1][-1][-1] == f"failed: {failed['failure']}"


def test_when_all_trials_fail_one_line_says_why(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    what = plan(tiny, colours, tmp_path, {"lr": [0.02], "prompts": [4000, 3999]}, prompt_init="tokens")
    with pytest.raises(DataError, match=r"^all 2 trials failed; the first: .*4000"):
        sweep(what)
    assert not (tmp_path / ".train" / "colours").exists() and AdapterStore(tmp_path).tasks() == []


def test_a_trial_whose_validation_loss_is_not_finite_fails(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite = SimpleNamespace(loss=float("nan"), accuracy=1.0)
    monkeypatch.setattr("gpt_serve.train.loop.evaluate", lambda *args: infinite)
    with pytest.raises(DataError, match="all 4 trials failed; the first: the validation loss is not finite"):
        sweep(plan(tiny, colours, tmp_path))


def test_a_machine_with_other_images_fails_its_trials(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "other")
    (tmp_path / "other" / "train" / "red" / "0.png").unlink()
    workers = InProcess()
    workers.change = lambda what: dataclasses.replace(
        what, job=dataclasses.replace(what.job, data=str(tmp_path / "other"))
    )
    with pytest.raises(DataError, match="images or weights on this machine are not those"):
        sweep(plan(tiny, colours, tmp_path), workers)


def test_bad_images_are_reported_before_any_trial(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "data")
    (tmp_path / "data" / "train" / "red" / "0.png").write_bytes(b"no image")
    workers = InProcess()
    with pytest.raises(GPTServeError, match="1 of 42 images cannot be read"):
        sweep(plan(tiny, tmp_path / "data", tmp_path / "adapters"), workers)
    assert workers.trials == 0


@pytest.mark.parametrize("varying", [(), ("lr",), ("gate_init",), ("prompts", "lr"), ("lr", "gate_init", "prompts")])
def test_every_shape_of_grid_is_plotted(tmp_path: Path, varying: tuple[str, ...]) -> None:
    values = {"lr": [0.1, 0.2], "gate_init": [-1.0, 5.0], "prompts": [3, 7]}
    axes = {name: both if name in varying else both[:1] for name, both in values.items()}
    trials = [
        {name: getattr(recipe, name) for name in axes} | outcome(0.1 * index, 1.0)
        for index, recipe in enumerate(make_grid(rates(RECIPE), axes))
    ]
    trials[0] |= {"status": "stopped"}
    report = {"task": "t", "method": "gated", "backbone": "b", "sweep": {"axes": axes, "trials": trials, "best": 0}}
    plot_sweep(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


# Ray's share of a cluster


@pytest.mark.parametrize(
    ("machines", "device", "jobs", "expected"),
    [
        ([{"CPU": 8.0}], "cpu", None, (2, 4, 0)),
        ([{"CPU": 2.0}], "auto", None, (1, 2, 0)),
        ([{"CPU": 2.0}], "cpu", 5, (5, 1, 0)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "cpu", 1, (1, 8, 0)),  # no machine has the 16
        ([{"CPU": 16.0, "GPU": 1.0}], "auto", None, (1, 16, 1)),
        ([{"CPU": 16.0, "GPU": 1.0}], "cuda", 4, (4, 4, 0.25)),
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}], "auto", 1, (1, 8, 1)),  # the 64 have no GPU beside them
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}], "cpu", 1, (1, 64, 0)),
        ([{"CPU": 16.0, "GPU": 2.0}], "cuda", 3, (3, 5, 0.5)),  # 2/3 would leave a third idle
    ],
)
def test_trials_share_what_ray_has(
    machines: list[dict[str, float]], device: str, jobs: int | None, expected: tuple[float, ...]
) -> None:
    at_a_time, options = shares(machines, device, jobs)
    assert (at_a_time, options["num_cpus"], options["num_gpus"]) == expected


def test_a_cluster_without_gpus_is_said_so() -> None:
    with pytest.raises(UsageError, match="Ray sees no GPU"):
        shares([{"CPU": 4.0}], "cuda", None)


# the command


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gets `InProcess`."""
    monkeypatch.setattr("gpt_serve.train.workers.local_workers", lambda device, jobs: InProcess()(jobs))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "0.1;0.2"], "'0.1;0.2' is not a valid float"),
        (["--prompts", "3,"], "'' is not a valid integer"),
        (["--data", "digits", "--recipe", "full"], "--method full: a sweep publishes an adapter"),
        (["--device", "cuda:1"], "use cuda, and CUDA_VISIBLE_DEVICES"),
        (["--ray-address", "ray://head:10001"], "run the command on a machine of the cluster"),
    ],
)
def test_bad_options_end_with_one_line(args: list[str], message: str, no_processes: None) -> None:
    result = CliRunner().invoke(main, ["sweep", "--task", "t", *args])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "head_rates"),
    [(["--recipe", "lda"], [0.002, 0.002]), (["--recipe", "lda", "--head-lr-scale", "3"], [0.03, 0.3])],
)
def test_each_trial_has_the_recipe_that_train_would_take_at_its_rate(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_processes: None,
    args: list[str],
    head_rates: list[float],
) -> None:
    asked: list[Sweep] = []

    def stop(what: Sweep, *_: Any) -> None:
        asked.append(what)
        raise UsageError("enough")

    monkeypatch.setattr("gpt_serve.train.sweep.sweep.run_sweep", stop)
    flags = ["sweep", "--task", "t", "--data", str(colours), "--adapters", str(tmp_path)]
    result = CliRunner().invoke(main, [*flags, "--lr", "0.01,0.1", "--gate-init", "1", "--prompts", "10", *args])
    assert result.stderr.endswith("enough\n")
    assert [recipe.lr for recipe in asked[0].recipes] == [0.01, 0.1]
    assert [recipe.lr * recipe.head_lr_scale for recipe in asked[0].recipes] == pytest.approx(head_rates)


@pytest.mark.parametrize(
    ("module", "args", "extra"), [("optuna", [], "sweep"), ("ray", ["--ray-address", "auto"], "ray")]
)
def test_what_is_not_installed_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, module: str, args: list[str], extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("gpt_serve.train.sweep")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(main, ["sweep", "--task", "t", *args])
    assert result.exit_code == 2 and result.stderr.endswith(f"pip install 'gpt-serve[{extra}]'\n")
    assert result.stderr.count("\n") == 1


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("ray")
    refused = r"^Ray cannot be used \(--ray-address 127.0.0.1:1\): .*refused$"
    with pytest.raises(UsageError, match=refused), ray_workers("127.0.0.1:1", "cpu", None):
        pass


def test_a_process_that_dies_as_it_loads_the_backbone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future

    @contextmanager
    def workers(*_: Any) -> Iterator[Submit]:
        yield die

    monkeypatch.setattr(sys.modules[ray_workers.__module__], "local_workers", workers)
    result = CliRunner().invoke(main, ["sweep", "--task", "t"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "gpt-serve: the process that loads the backbone died: it may have run out of memory\n"


def test_a_training_elsewhere_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def workers(*_: Any) -> Iterator[Submit]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("WorkerCrashedError"))
        yield lambda *_: future

    monkeypatch.setattr("gpt_serve.train.places.ray_workers", workers)
    result = CliRunner().invoke(main, ["train", "--task", "t", "--data", "digits", "--ray-address", "auto"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the process that trained died (WorkerCrashedError): it may have run out of memory" in result.stderr
