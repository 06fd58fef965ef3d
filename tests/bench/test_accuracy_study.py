"""The accuracy study plans runs that ``gpt-serve train`` takes, and reports what they printed."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_serve.cli.train import train
from gpt_serve.train.recipes.recipe import make_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
MODULES = ("plan", "report", "study")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The script, with runs in a folder of the test's own."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module("study")
    monkeypatch.setattr(script, "RUNS", tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    yield script
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def work(study: Any, tmp_path: Path) -> Any:
    return study.Study(tmp_path / "data", tmp_path / "work", 2)


def done(study: Any, run: Any, val: float = 0.5, loss: float = 1.0, test: float = 0.5, **more: Any) -> None:
    """As if ``train`` had printed this for the run."""
    select = "loss" if "loss" in run.variant.flags else "accuracy"
    recipe = {"method": run.method, "epochs": run.epochs, "lr": run.lr, "seed": run.seed, "select": select}
    metrics = {"val_accuracy": val, "val_loss": loss, "test_accuracy": test}
    summary = {"recipe": recipe, "metrics": metrics, "trainable_parameters": 1234, **more}
    (study.RUNS / f"{run.name}.json").write_text(json.dumps(summary))


def finish(study: Any, work: Any) -> None:
    """All runs, as fast as they can be planned."""
    for variant in study.BY_NAME.values():
        for lr in variant.rates:
            done(study, study.Run(variant, "flowers", lr, 0))
    for run in [*work.methods(), *(run for ablation in study.ABLATIONS for run in flat(work.ablation(ablation)))]:
        done(study, run)
    for run in work.nmi().values():
        done(study, run, nmi=[[0.1, 0.3], [0.2, 0.2], [0.5, 0.7]])


def flat(runs: dict[str, list[Any]]) -> list[Any]:
    return [run for some in runs.values() for run in some]


def test_every_planned_run_has_a_name_of_its_own_and_flags_that_train_takes(study: Any, work: Any) -> None:
    finish(study, work)
    runs = {run for ablation in study.ABLATIONS for run in flat(work.ablation(ablation))}
    runs |= {*work.methods(), *work.nmi().values()}
    assert len({run.name for run in runs}) == len(runs) > 100
    for run in runs:
        context = train.make_context("train", [*run.arguments], resilient_parsing=False)
        given = context.params
        assert (given["task"], given["method"], given["seed"]) == (run.task, run.method, run.seed)
        fields = make_recipe("adamw").to_dict()
        recipe = make_recipe(given["recipe"], **{name: given[name] for name in fields if name in given})
        head = run.variant.head_rate or run.lr
        assert recipe.lr == pytest.approx(run.lr) and recipe.lr * recipe.head_lr_scale == pytest.approx(head)
        assert recipe.epochs == run.epochs


def test_a_rate_is_chosen_by_validation_accuracy_and_by_loss_with_a_head_from_lda(study: Any, work: Any) -> None:
    for name, better in (("gated", 0.01), ("gated, LDA", 0.05)):
        variant = study.BY_NAME[name]
        assert work.rate(variant) is None
        done(study, study.Run(variant, "flowers", 0.01, 0), val=0.8, loss=0.7, test=0.1)
        assert work.rate(variant) is None
        done(study, study.Run(variant, "flowers", 0.05, 0), val=0.7, loss=0.6, test=0.9)
        assert work.rate(variant) == better


def test_a_run_of_another_plan_is_refused(study: Any, work: Any) -> None:
    run = study.Run(study.BY_NAME["gated"], "flowers", 0.01, 0)
    done(study, run)
    assert work.result(run) is not None
    path = study.RUNS / f"{run.name}.json"
    path.write_text(path.read_text().replace('"epochs": 10', '"epochs": 11'))
    with pytest.raises(SystemExit, match="made with another epochs than the plan has: delete it"):
        work.result(run)


def test_a_share_is_the_first_images_of_each_class_and_the_others_whole(study: Any, work: Any) -> None:
    for split, count in (("train", 8), ("val", 3), ("test", 5)):
        for label in ("a", "b"):
            (work.data / "flowers12" / split / label).mkdir(parents=True)
            for index in range(count):
                (work.data / "flowers12" / split / label / f"{index}.jpg").write_bytes(b"")
    run = study.Run(study.BY_NAME["linear"], "flowers", 0.1, 0, (), 0.25)
    for _ in range(2):
        folder = work.images(run)
    assert sorted(path.name for path in (folder / "train" / "b").iterdir()) == ["0.jpg", "1.jpg"]
    assert len(list((folder / "val" / "a").iterdir())) == 3 and len(list((folder / "test" / "b").iterdir())) == 5
    assert run.epochs == 4 * study.Run(study.BY_NAME["linear"], "flowers", 0.1, 0).epochs


def test_the_report_gives_mean_and_spread_and_says_what_is_missing(study: Any, work: Any, tmp_path: Path) -> None:
    finish(study, work)
    gated = study.BY_NAME["gated"]
    lr = work.rate(gated)
    for seed, test in enumerate((0.7, 0.8, 0.75)):
        done(study, study.Run(gated, "flowers", lr, seed), test=test)
    (study.RUNS / f"{study.Run(gated, 'digits', lr, 2).name}.json").unlink()
    study.write_report(work, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| gated |"))
    mean = "**58.3 ± 2.4 (2 of 3 seeds)**"
    assert row == f"| gated | 75.0 ± 5.0 | 50.0 ± 0.0 | 50.0 ± 0.0 (2 of 3 seeds) | {mean} | 1,234 | {lr:g} |"
    assert "| vpt-deep | 0.200 | 0.600 |" in text
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {"methods.png", *(f"{ablation.name}.png" for ablation in study.ABLATIONS)}
