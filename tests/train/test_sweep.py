"""The sweep without Ray, on trials that run one after the other in this process; `test_sweep_ray` runs it with Ray."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
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
from gpt_serve.train.job import Job
from gpt_serve.train.recipes.recipe import Recipe, Select, make_recipe
from gpt_serve.train.sweep import trial as module
from gpt_serve.train.sweep.ray import RayRunner
from gpt_serve.train.sweep.report import plot_sweep, report_table
from gpt_serve.train.sweep.sweep import Sweep, make_axes, make_grid, run_sweep
from gpt_serve.train.sweep.trial import BackboneSource, Work, run_trial
from gpt_serve.train.sweep.trials import Outcome, Trial, TrialStore, best_trial
from tests.train.conftest import Recorder

RECIPE = make_recipe("adamw", prompts=2, epochs=2, warmup=0, batch_size=8)
AXES = {"lr": [0.0001, 0.02], "gate_init": [1.0, 5.0], "prompts": [2]}
SOURCE = BackboneSource("tiny")


class InProcess:
    """A `Runner`; interrupts before trial number ``stop_at``."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.seen: list[Recipe] = []

    def __call__(
        self, work: Work, recipes: Sequence[Recipe], finished: Callable[[int, Outcome], object]
    ) -> dict[int, str]:
        for index, recipe in enumerate(recipes):
            if index == self.stop_at:
                raise KeyboardInterrupt
            self.seen.append(recipe)
            outcomes: list[Outcome] = []
            run_trial(work, recipe, outcomes.append)
            finished(index, outcomes[-1])
        return {}


@pytest.fixture(autouse=True)
def loads_tiny(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trials, too, get the tiny backbone."""
    monkeypatch.setattr(BackboneSource, "load", lambda self, device: tiny)
    module._open.cache_clear()
    yield
    module._open.cache_clear()


def plan(data: Path, adapters: Path, axes: dict[str, list[Any]] | None = None, **changes: Any) -> Sweep:
    recipe = dataclasses.replace(RECIPE, **changes)
    axes = axes or AXES
    return Sweep(Job("colours", str(data), adapters, recipe), axes, make_grid(rates(recipe), axes))


def rates(recipe: Recipe) -> Callable[[float], Recipe]:
    """``recipe`` at any rate."""
    return lambda lr: dataclasses.replace(recipe, lr=lr)


def resumed(sweep: Sweep) -> Sweep:
    return dataclasses.replace(sweep, job=dataclasses.replace(sweep.job, resume=True))


def sweep(backbone: Backbone, what: Sweep, runner: InProcess | None = None, recorder: Recorder | None = None) -> Any:
    return run_sweep(backbone, SOURCE, what, runner or InProcess(), recorder or Recorder())


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


def test_the_best_is_by_what_epochs_are_selected_by_then_by_order() -> None:
    def best(*values: tuple[float, float] | str, select: Select = "accuracy") -> int | None:
        trials = [
            Trial(
                dataclasses.replace(RECIPE, seed=index, select=select),
                Outcome(failure=value) if isinstance(value, str) else Outcome(1.0, 2, 1, *value),
            )
            for index, value in enumerate(values)
        ]
        found = best_trial(trials)
        return None if found is None else trials.index(found)

    assert best((0.8, 0.1), (0.9, 5.0), (0.7, 0.01)) == 1
    assert best((0.9, 0.3), (0.9, 0.2), (0.9, 0.4)) == 1
    assert best("boom", (0.5, 1.0), (0.5, 1.0)) == 1
    assert best("boom", "bang") is None
    assert best((0.8, 0.1), (0.9, 5.0), (0.7, 0.01), select="loss") == 2
    assert best((0.9, 0.2), (0.95, 0.2), (0.95, 0.2), select="loss") == 1
    assert best("boom", (0.5, 1.0), select="loss") == 1


def test_the_report_ranks_trials_by_what_epochs_are_selected_by() -> None:
    def trial(lr: float, accuracy: float, loss: float) -> dict[str, Any]:
        outcome = Outcome(1.0, 2, 1, accuracy, loss)
        return {"lr": lr, **outcome.to_dict(2)}

    def order(select: Select) -> list[str]:
        return [row[0] for row in report_table(tried, select)[1]]

    trials = [trial(1, 0.8, 0.1), trial(2, 0.9, 5.0), trial(3, 0.9, 0.2), trial(4, 0.8, 0.1)]
    tried = {"axes": {"lr": [1, 2, 3, 4]}, "trials": trials}
    assert (order("accuracy"), order("loss")) == (["3", "2", "1", "4"], ["1", "4", "3", "2"])


# a sweep


def test_the_published_adapter_is_what_train_gives_with_the_best_recipe(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    report = sweep(tiny, plan(colours, tmp_path / "swept"))
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
    train_adapter(tiny, Job("colours", str(colours), tmp_path / "trained", recipe), Recorder(), World())
    swept, trained = (AdapterStore(tmp_path / name).load("colours").adapter for name in ("swept", "trained"))
    for name in ("prompt", "gamma", "tau", "head_weight", "head_bias"):
        assert torch.equal(getattr(swept, name), getattr(trained, name))

    folder = tmp_path / "swept" / "colours"
    assert json.loads((folder / "sweep.json").read_text()) == report
    assert report["revision"] in (folder / "sweep.md").read_text()
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "swept" / ".train" / "colours").exists() and not list(folder.glob(".*"))


def test_the_report_lists_what_all_trials_share(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    what = plan(colours, tmp_path, {"lr": [0.01, 0.02]}, final_fit=True)
    scaled = [dataclasses.replace(recipe, head_lr_scale=1 / recipe.lr) for recipe in what.recipes]
    shared = sweep(tiny, dataclasses.replace(what, recipes=scaled))["sweep"]["shared"]
    assert shared["final_fit"] is False and shared["epochs"] == RECIPE.epochs
    assert "lr" not in shared and "head_lr_scale" not in shared
    assert "| final_fit | False |" in (tmp_path / "colours" / "sweep.md").read_text()


def test_a_final_fit_is_the_winners_alone(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """VTAB-1K's protocol: trials are judged on validation images, and the winner is trained on them, too."""
    runner = InProcess()
    report = sweep(tiny, plan(colours, tmp_path, {"lr": [0.01, 0.02]}, final_fit=True), runner)
    assert [recipe.final_fit for recipe in runner.seen] == [False, False]
    assert report["recipe"]["final_fit"] and "val_accuracy" not in report["metrics"]
    assert all(trial["val_accuracy"] > 0 for trial in report["sweep"]["trials"])


def test_test_images_play_no_part(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    """With their labels exchanged, or without them, the same trial wins with the same figures."""
    wrong, without = tmp_path / "wrong", tmp_path / "without"
    shutil.copytree(colours, wrong)
    (wrong / "test" / "red").rename(wrong / "test" / "spare")
    (wrong / "test" / "blue").rename(wrong / "test" / "red")
    (wrong / "test" / "spare").rename(wrong / "test" / "blue")
    shutil.copytree(colours, without)
    shutil.rmtree(without / "test")
    reports = [sweep(tiny, plan(data, tmp_path / f"a-{data.name}")) for data in (colours, wrong, without)]
    for report in reports:
        for trial in report["sweep"]["trials"]:
            del trial["seconds"]
    assert reports[0]["sweep"] == reports[1]["sweep"] == reports[2]["sweep"]
    assert reports[0]["metrics"]["test_accuracy"] != reports[1]["metrics"]["test_accuracy"]


def test_an_interrupted_sweep_goes_on_where_it_was(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    whole = sweep(tiny, plan(colours, tmp_path / "whole"))
    what, recorder = plan(colours, tmp_path / "parts"), Recorder()
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, what, InProcess(stop_at=3), recorder)
    assert recorder.notices[-1] == "3 of 4 trials are done: add --resume to continue"
    assert AdapterStore(tmp_path / "parts").tasks() == []

    with pytest.raises(UsageError, match=r"unfinished sweep of 'colours' has 3 trials done: add --resume .* delete "):
        sweep(tiny, what)
    with pytest.raises(UsageError, match=r"other settings \(epochs was 2 and is 3\)"):
        sweep(tiny, resumed(plan(colours, tmp_path / "parts", epochs=3)))

    runner = InProcess()
    report = sweep(tiny, resumed(what), runner)
    assert runner.seen == list(what.recipes)[3:]
    for result in (report, whole):
        for trial in result["sweep"]["trials"]:
            del trial["seconds"]
    assert report["sweep"] == whole["sweep"]
    with pytest.raises(UsageError, match="nothing to resume"):
        sweep(tiny, resumed(what))


def test_an_interrupt_while_the_best_is_trained_costs_no_epoch(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    what = plan(colours, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, what, recorder=Recorder(interrupt_at=1))
    runner, recorder = InProcess(), Recorder()
    sweep(tiny, resumed(what), runner, recorder)
    assert runner.seen == [] and [record.epoch for record in recorder.epochs] == [1]


def test_an_interrupted_training_of_other_settings_is_not_continued(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    what = plan(colours, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, what, None, Recorder(interrupt_at=1))
    other = Job("colours", str(colours), tmp_path, dataclasses.replace(RECIPE, lr=0.3))
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tiny, other, Recorder(interrupt_at=1), World())
    recorder = Recorder()
    report = sweep(tiny, resumed(what), None, recorder)
    assert any("an interrupted run of 'colours' is replaced" in notice for notice in recorder.notices)
    assert report["recipe"]["lr"] == 0.02


def test_trials_that_were_stopped_early_run_again_when_none_are_to_be(tmp_path: Path) -> None:
    store = TrialStore(tmp_path, "t")
    store.prepare()
    identities = [{"lr": lr, "epochs": 4} for lr in (0.1, 0.2, 0.3, 0.4)]
    outcomes = [Outcome(1.0, 2, 0, 0.5, 1.0), Outcome(1.0, 4, 0, 0.5, 1.0), Outcome(1.0, failure="boom")]
    for identity, outcome in zip(identities, outcomes, strict=False):
        store.save(identity, outcome)
    assert store.load(identities, stopped=True) == dict(enumerate(outcomes))
    assert list(store.load(identities, stopped=False)) == [1, 2]
    assert store.load([{"lr": 0.2, "epochs": 4}, {"lr": 9.0, "epochs": 4}], stopped=True) == {0: outcomes[1]}
    next(iter(tmp_path.rglob("*.json"))).write_text("{")
    with pytest.raises(UsageError, match="is damaged: delete it"):
        store.load(identities, stopped=True)


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    axes = {"lr": [0.02], "prompts": [4000, 2]}
    what = plan(colours, tmp_path, axes, prompt_init="tokens")
    report = sweep(tiny, what)
    failed, good = report["sweep"]["trials"]
    assert failed["status"] == "failed" and "4000" in failed["failure"] and failed["val_accuracy"] is None
    assert good["status"] == "finished" and report["sweep"]["best"] == 1
    assert report_table(report["sweep"], "accuracy")[1][-1][-1] == f"failed: {failed['failure']}"


def test_when_all_trials_fail_one_line_says_why(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    what = plan(colours, tmp_path, {"lr": [0.02], "prompts": [4000, 3999]}, prompt_init="tokens")
    with pytest.raises(DataError, match=r"^all 2 trials failed; the first: .*4000"):
        sweep(tiny, what)
    assert not (tmp_path / ".train" / "colours").exists() and AdapterStore(tmp_path).tasks() == []


def test_a_trial_whose_validation_loss_is_not_finite_fails(
    tiny: Backbone, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(work: Work, recipes: Sequence[Recipe], finished: Callable[[int, Outcome], object]) -> dict[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(
                "gpt_serve.train.loop.evaluate", lambda *args: SimpleNamespace(loss=float("nan"), accuracy=1.0)
            )
            outcomes: list[Outcome] = []
            run_trial(work, recipes[0], outcomes.append)
        assert len(outcomes) == 1 and "validation loss is not finite" in str(outcomes[0].failure)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(tiny, SOURCE, plan(colours, tmp_path), run, Recorder())


@pytest.mark.parametrize(("change", "what"), [({"digest": "0"}, "images"), ({"fingerprint": "0"}, "weights")])
def test_a_machine_with_other_data_fails_its_trials(
    tiny: Backbone, colours: Path, tmp_path: Path, change: dict[str, str], what: str
) -> None:
    class Elsewhere(InProcess):
        def __call__(self, work: Work, *args: Any) -> dict[int, str]:
            return super().__call__(dataclasses.replace(work, **change), *args)  # type: ignore[arg-type]

    with pytest.raises(DataError, match=f"the {what} on this machine are not those"):
        sweep(tiny, plan(colours, tmp_path), Elsewhere())


def test_bad_images_are_reported_before_any_trial(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "data")
    (tmp_path / "data" / "train" / "red" / "0.png").write_bytes(b"no image")
    runner = InProcess()
    with pytest.raises(GPTServeError, match="1 of 42 images cannot be read"):
        sweep(tiny, plan(tmp_path / "data", tmp_path / "adapters"), runner)
    assert runner.seen == []


@pytest.mark.parametrize("varying", [(), ("lr",), ("gate_init",), ("prompts", "lr"), ("lr", "gate_init", "prompts")])
def test_every_shape_of_grid_is_plotted(tmp_path: Path, varying: tuple[str, ...]) -> None:
    values = {"lr": [0.1, 0.2], "gate_init": [-1.0, 5.0], "prompts": [3, 7]}
    axes = {name: both if name in varying else both[:1] for name, both in values.items()}
    trials = [
        {name: getattr(recipe, name) for name in axes} | Outcome(1.0, 2, 1, 0.1 * index, 1.0).to_dict(2)
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
        ([{"CPU": 8.0}], "cpu", None, (2, {"cpu": 4.0})),
        ([{"CPU": 2.0}], "cpu", None, (1, {"cpu": 2.0})),
        ([{"CPU": 2.0}], "cpu", 5, (5, {"cpu": 1.0})),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "cpu", 1, (1, {"cpu": 8.0})),  # no machine has the 16
        ([{"CPU": 16.0, "GPU": 1.0}], "cuda", None, (1, {"cpu": 16.0, "gpu": 1.0})),
        ([{"CPU": 16.0, "GPU": 1.0}], "cuda", 4, (4, {"cpu": 4.0, "gpu": 0.25})),
        ([{"CPU": 16.0, "GPU": 2.0}], "cuda", 3, (3, {"cpu": 5.0, "gpu": 0.5})),  # 2/3 would leave a third idle
    ],
)
def test_trials_share_what_ray_has(
    monkeypatch: pytest.MonkeyPatch, machines: list[dict[str, float]], device: str, jobs: int | None, expected: Any
) -> None:
    fake_ray(monkeypatch, machines)
    assert RayRunner(jobs=jobs)._share(device) == expected


def test_a_cluster_without_gpus_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray(monkeypatch, [{"CPU": 4.0}])
    with pytest.raises(UsageError, match="Ray sees no GPU"):
        RayRunner()._share("cuda")


def fake_ray(monkeypatch: pytest.MonkeyPatch, machines: list[dict[str, float]]) -> None:
    total = {name: sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU")}
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    fake = SimpleNamespace(cluster_resources=lambda: total, nodes=lambda: [*nodes, {"Alive": False, "Resources": {}}])
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]


# the command


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
def test_bad_options_end_with_one_line(args: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["sweep", "--task", "t", *args])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "head_rates"),
    [(["--recipe", "lda"], [0.002, 0.002]), (["--recipe", "lda", "--head-lr-scale", "3"], [0.03, 0.3])],
)
def test_each_trial_has_the_recipe_that_train_would_take_at_its_rate(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], head_rates: list[float]
) -> None:
    asked: list[Sweep] = []

    def stop(_: Backbone, __: BackboneSource, what: Sweep, *___: Any) -> None:
        asked.append(what)
        raise UsageError("enough")

    monkeypatch.setattr("gpt_serve.train.sweep.sweep.run_sweep", stop)
    flags = ["sweep", "--task", "t", "--data", str(colours), "--adapters", str(tmp_path)]
    result = CliRunner().invoke(main, [*flags, "--lr", "0.01,0.1", "--gate-init", "1", "--prompts", "10", *args])
    assert result.stderr.endswith("enough\n")
    assert [recipe.lr for recipe in asked[0].recipes] == [0.01, 0.1]
    assert [recipe.lr * recipe.head_lr_scale for recipe in asked[0].recipes] == pytest.approx(head_rates)


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, ["sweep", "--task", "t"])
    assert result.exit_code == 2 and result.stderr.endswith("pip install 'gpt-serve[sweep]'\n")
    assert result.stderr.count("\n") == 1
