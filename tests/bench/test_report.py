import json
from pathlib import Path

import pytest

from gpt_serve.bench.report import Record, machine_facts, markdown, merged, read, save
from gpt_serve.bench.targets import targets
from gpt_serve.bench.timing import Plan, Ratio, Row
from gpt_serve.errors import UsageError

MACHINE = {"cpu": "Some CPU", "device": "cpu", "load_before": 0.1}
ROWS = [
    Row("prompts", "tiny", "batch 8", "bare timm", 0.5, 3, Ratio(1, 1, 1), {"FLOP ratio": 1.0}),
    Row("prompts", "tiny", "batch 8", "open, 100", 0.004, 3, Ratio(1.256, 1.2, 1.3), {"FLOP ratio": 1.6}),
]
HTTP = [
    Row("http", "tiny", "64 JPEG files", "engine alone", 0.01, 2, Ratio(1, 1, 1)),
    Row("http", "tiny", "64 JPEG files", "8 clients", 0.02, 2, Ratio(2, 2, 2), {"p50 ms": 160.0}),
]
RECORDS = [
    Record("prompts", "tiny", MACHINE, Plan(repeats=3), ROWS),
    Record("http", "tiny", MACHINE | {"load_before": 1.5}, Plan(repeats=3), HTTP),
]


def test_markdown() -> None:
    assert markdown(RECORDS) == (
        "# Results\n\n"
        "Written by `gpt-serve bench`; [how to read this](../README.md).\n\n"
        "- cpu: Some CPU\n"
        "- device: cpu\n"
        "- load before: 0.1 to 1.5\n\n"
        "## Targets\n\n"
        "| figure | measured on | target | median | quartiles | met |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| 3. time with 100 prompts and open gates by the bare backbone's, by the FLOP ratio "
        "| tiny, batch 8, open, 100 | <= 1.05 | 0.785 | 0.75-0.812 | yes |\n\n"
        "## Prompts: timm's own forward pass against the engine's (tiny)\n\n"
        "| case | variant | ms/image | images/s | ratio | quartiles | FLOP ratio | rounds |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| batch 8 | bare timm | 500.00 | 2.0 | 1.00 | 1.00-1.00 | 1.00 | 3 |\n"
        "| batch 8 | open, 100 | 4.00 | 250.0 | 1.26 | 1.20-1.30 | 1.60 | 3 |\n\n"
        "## Server: the engine alone against saturated HTTP (tiny)\n\n"
        "| case | variant | ms/image | images/s | ratio | quartiles | p50 ms | rounds |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| 64 JPEG files | engine alone | 10.00 | 100.0 | 1.00 | 1.00-1.00 |  | 2 |\n"
        "| 64 JPEG files | 8 clients | 20.00 | 50.0 | 2.00 | 2.00-2.00 | 160.00 | 2 |\n"
    )


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    save(tmp_path / "new", RECORDS)
    assert read(tmp_path / "new") == RECORDS
    assert (tmp_path / "new" / "tables.md").read_text() == markdown(RECORDS)
    (written, _) = json.loads((tmp_path / "new" / "results.json").read_text())
    assert set(written) == {"name", "backbone", "machine", "plan", "rows"}
    assert written["rows"][1]["ratio"] == {"median": 1.256, "q1": 1.2, "q3": 1.3}


@pytest.mark.parametrize("name", ["benchmarks/results", "benchmarks/export"])
def test_the_tables_that_are_kept_are_those_of_the_kept_numbers(name: str) -> None:
    folder = Path(__file__).parents[2] / name
    text = (folder / "tables.md").read_text()
    command = "gpt-serve bench" if name.endswith("results") else "python benchmarks/export/compare.py"
    assert text == markdown(read(folder), command)


def test_machine_facts_name_versions_but_no_machine() -> None:
    facts = machine_facts("cpu")
    names = {"date", "cpu", "cores", "device", "threads", "load_before", "python", "torch", "timm", "litserve"}
    assert set(facts) - {"peft"} == names | {"gpt-serve", "onnxruntime"}
    assert facts["device"] == "cpu" and facts["threads"] == 1 and facts["cpu"]
    json.dumps(facts)


def test_unwritable_folders_are_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another --output"):
        save(tmp_path / "file", RECORDS)
    (tmp_path / "tables.md").mkdir()
    with pytest.raises(UsageError, match="choose another --output"):
        save(tmp_path, RECORDS)


def test_a_benchmark_measured_again_replaces_itself_alone() -> None:
    def record(name: str, backbone: str, repeats: int) -> Record:
        return Record(name, backbone, {}, Plan(repeats), [])

    before = [record("tasks", "one", 1), record("cold", "one", 2)]
    after = merged(merged(before, record("tasks", "two", 3)), record("cold", "one", 4))
    assert [(item.name, item.backbone, item.plan.repeats) for item in after] == [
        ("tasks", "one", 1),
        ("tasks", "two", 3),
        ("cold", "one", 4),
    ]


def test_targets_are_held_against_the_right_rows() -> None:
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
