"""The scripts in ``benchmarks/engine`` measure what they say."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench.timing import Plan, Ratio, Row
from gpt_serve.engine.engine import Engine
from gpt_serve.model.backbone import Backbone
from tests import reference
from tests.factories import make_adapter
from tests.tiny_vit import random_images, tiny_backbone

SHORT = Plan(repeats=1, sample_seconds=0)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "engine")
    monkeypatch.delitem(sys.modules, "run", raising=False)  # of another folder with a script of that name


@pytest.fixture
def setting(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A `Setting` with few points; without PEFT and onnxruntime, which take seconds to begin."""
    import churn
    import peers
    from setting import FULL

    monkeypatch.setattr(churn, "HELD", 3)
    monkeypatch.setattr(churn, "BATCH", 8)
    monkeypatch.setattr(peers, "lora_model", lambda *_: None)
    monkeypatch.setattr(peers, "onnx_engine", lambda backbone, store, *_: Engine(backbone, store))
    scale = dataclasses.replace(
        FULL,
        batch=4,
        few_tasks=2,
        long_batch=2,
        task_counts=(1, 4),
        swapped_counts=(1,),
        prompt_counts=(0, 5),
        prompt_batches=(1, 2),
        bank_counts=(1, 5),
        bank_batches=1,
        cold=4,
    )
    return SimpleNamespace(backbone=tiny, plan=SHORT, scale=scale)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_authors_loop_equals_the_reference(pool: str) -> None:
    from authors import AuthorsModel

    backbone = tiny_backbone(pool)  # type: ignore[arg-type]
    adapter = dataclasses.replace(make_adapter(backbone.spec), tau=torch.tensor([0.5, 1.5, 12.0]))
    images = random_images(2)
    actual = AuthorsModel(backbone, adapter)(images)
    for row, image in enumerate(images):
        expected = reference.forward(
            backbone.model,
            image,
            pool=pool,
            head_weight=adapter.head_weight,
            head_bias=adapter.head_bias,
            prompt=adapter.prompt,
            gamma=adapter.gamma,
            tau=adapter.tau,
        )
        torch.testing.assert_close(actual[row], expected.logits.softmax(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_all_ways_to_serve_answer_alike(pool: str, tmp_path: Path) -> None:
    from peers import check_answers
    from setting import pixels, ready, write_gated
    from swapped import TaskModel, each_its_own, grouped, in_arrival_order

    backbone = tiny_backbone(pool)  # type: ignore[arg-type]
    store = AdapterStore(tmp_path, backbone.spec)
    adapters = write_gated(store, backbone, "task", [3, 3])
    chosen, raw = [adapters[index] for index in (0, 1, 1, 0, 1)], pixels(backbone, 5)
    images, engine = ready(backbone, raw), Engine(backbone, store)
    check_answers(engine, chosen, raw, images)
    models = [TaskModel(backbone, adapter) for adapter in adapters]
    with torch.inference_mode():
        expected = grouped(models[0], chosen, images)
        torch.testing.assert_close(in_arrival_order(models[0], chosen, images), expected)
        models[0].load(adapters[0])
        torch.testing.assert_close(each_its_own(models, chosen, images), expected)
    with pytest.raises(AssertionError, match="differ from the engine's"):
        check_answers(engine, chosen, raw, images.flip(0))


@pytest.mark.slow
def test_peft_computes_each_image_with_its_own_adapter(tiny: Backbone) -> None:
    pytest.importorskip("peft")
    from lora import LoraModel, lora_bytes
    from setting import gated

    adapters = [gated(tiny, f"task-{index}", 2) for index in range(3)]
    model, images = LoraModel(tiny, adapters), random_images(4)
    names = ["task-2", "task-0", "task-2", "task-1"]
    with torch.inference_mode():
        mixed = model(images, names)
        for row, name in enumerate(names):
            alone = model(images[row : row + 1], [name])[0]
            torch.testing.assert_close(mixed[row], alone)
        assert not torch.allclose(model(images[:1], ["task-0"]), model(images[:1], ["task-1"]))
    weights = [value for name, value in model.peft.named_parameters() if ".task-0." in name]
    assert sum(4 * weight.numel() for weight in weights) == lora_bytes(tiny)


def test_every_part_gives_comparable_rows(setting: SimpleNamespace, tmp_path: Path) -> None:
    """Then they are written, read, drawn, and held against the targets."""
    import churn
    import curves
    import overhead
    import peers
    from plots import draw
    from record import Record, markdown, merged, read, save

    parts = {
        "peers": peers.bench_peers,
        "tasks": curves.bench_tasks,
        "prompts": curves.bench_prompts,
        "bank": churn.bench_bank,
        "cold": churn.bench_cold,
        "overhead": overhead.bench_overhead,
    }
    records: list[Record] = []
    for name, part in parts.items():
        rows = part(setting)
        assert {row.benchmark for row in rows} == {name}
        for case in {row.case for row in rows}:
            first = next(row for row in rows if row.case == case)
            assert first.ratio == Ratio(1.0, 1.0, 1.0)
        records = merged(
            records, Record(name, "tiny", {"device": "cpu", "load_before": 0.5}, SHORT, 0.1, tuple(rows)), list(parts)
        )
    assert [row.variant for row in records[1].rows] == ["engine, 1", "engine, 4", "swapped, grouped by task, 1"]
    assert [row.case for row in records[3].rows[::3]] == [
        "1 on disk, uniform",
        "1 on disk, Zipf(1.1)",
        "5 on disk, uniform",
        "5 on disk, Zipf(1.1)",
    ]
    save(tmp_path, records)
    assert [record.name for record in read(tmp_path)] == list(parts)
    assert markdown(read(tmp_path)) == (tmp_path / "tables.md").read_text()
    draw(records, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"peers", "tasks", "prompts", "bank"}


def test_a_part_measured_again_replaces_itself_alone() -> None:
    from record import Record, merged

    def record(name: str, backbone: str, minutes: float) -> Record:
        return Record(name, backbone, {}, SHORT, minutes, ())

    before = [record("tasks", "one", 1), record("cold", "one", 2)]
    after = merged(
        merged(before, record("tasks", "two", 3), ["peers", "tasks", "cold"]),
        record("cold", "one", 4),
        ["peers", "tasks", "cold"],
    )
    assert [(item.name, item.backbone, item.minutes) for item in after] == [
        ("tasks", "one", 1),
        ("tasks", "two", 3),
        ("cold", "one", 4),
    ]


def test_targets_are_held_against_the_right_rows() -> None:
    from targets import targets

    def row(benchmark: str, case: str, variant: str, ratio: float, **extra: float) -> Row:
        return Row(benchmark, "tiny", case, variant, 1.0, 3, Ratio(ratio, ratio - 0.1, ratio + 0.1), extra)

    rows = [
        row("tasks", "batch 64", "engine, 64", 1.25),
        row("peers", "batch 16, 16 tasks", "swapped, grouped by task", 2.5),
        row("peers", "batch 16, 8 tasks", "swapped, grouped by task", 2.5),  # no target
        row("prompts", "batch 8", "open, 100", 1.6, **{"FLOP ratio": 1.6}),
        row("overhead", "batch 32, one task", "engine", 1.0, **{"own share, %": 3.5}),
        row("cold", "one image", "from disk", 2.0, **{"beyond ms": 4.0, "q1": 3.0, "q3": 5.0}),
    ]
    cells = {line[0][:2]: line[2:] for line in targets(rows, "cpu")}
    assert cells == {
        "1.": [">= 0.95", "0.8", "0.741-0.87", "no"],
        "3.": ["<= 1.05", "1", "0.938-1.06", "yes"],
        "5.": [">= 2", "2.5", "2.4-2.6", "yes"],
        "6.": ["<= 3", "3.5", "3.5-3.5", "no"],
        "8.": ["<= 10", "4", "3-5", "yes"],
    }
    assert targets(rows[1:2], "cuda")[0][2:] == [">= 8", "2.5", "2.4-2.6", "no"]


def test_the_soak_fails_when_the_process_grows(setting: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import soak

    monkeypatch.setattr(soak, "ADAPTERS", 30)
    monkeypatch.setattr(soak, "HELD", 10)
    rows = soak.bench_soak(setting, requests=40, warm_up=10)
    assert len(rows) == 1 + soak.SAMPLES
    assert rows[-1].case == "after 40 requests"
    assert rows[-1].extra["loads"] > rows[0].extra["loads"] > 0
    sizes = iter(range(100, 1000, 10))
    monkeypatch.setattr(soak, "resident_megabytes", lambda: float(next(sizes)))
    with pytest.raises(AssertionError, match="left the process 200.0 MB larger"):
        soak.bench_soak(setting, requests=40, warm_up=10)


def test_the_command_measures_named_parts(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = importlib.import_module("run")
    rows = [
        Row("cold", "tiny", "one image", "from disk", 1.0, 3, Ratio(1, 1, 1), {"beyond ms": 4.0, "q1": 3.0, "q3": 5.0})
    ]
    monkeypatch.setitem(run.PARTS, "cold", lambda setting: rows if setting.plan.repeats == 7 else [])
    monkeypatch.setattr(Backbone, "load", lambda name, **_: tiny)
    monkeypatch.setattr("sys.argv", ["run.py", "--only", "cold", "--rounds", "7", "--output", str(tmp_path / "new")])
    run.main()
    assert "| 8. first answer" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "new" / "results.json").read_text())
    assert (record["name"], record["backbone"], len(record["rows"])) == ("cold", "vit_base_patch16_224", 1)
