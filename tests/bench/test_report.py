import json
from pathlib import Path

import pytest

from gpt_serve.bench.report import Report, machine_facts, make_folder
from gpt_serve.bench.timing import Plan, Ratio, Row
from gpt_serve.errors import UsageError

ROWS = [
    Row("forward", "tiny", "batch 8", "timm", 0.5, 3, Ratio(1, 1, 1), {"FLOP ratio": 1.0}),
    Row("forward", "tiny", "batch 8", "prompted, P = 10", 0.004, 3, Ratio(1.256, 1.2, 1.3), {"FLOP ratio": 1.16}),
    Row("http", "tiny", "64 JPEG files", "engine alone", 0.01, 2, Ratio(1, 1, 1)),
    Row("http", "tiny", "64 JPEG files", "8 clients", 0.02, 2, Ratio(2, 2, 2), {"p50 ms": 160.0}),
]
REPORT = Report({"cpu": "Some CPU", "load_before": 0.1}, Plan(repeats=3), ROWS)


def test_markdown() -> None:
    assert REPORT.markdown() == (
        "# Results\n\n"
        "Written by `gpt-serve bench`; [how to read this](../README.md).\n\n"
        "- cpu: Some CPU\n"
        "- load before: 0.1\n\n"
        "## Forward pass: timm's own against the prompted one (tiny)\n\n"
        "| case | variant | ms/image | images/s | ratio | quartiles | FLOP ratio | rounds |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| batch 8 | timm | 500.00 | 2.0 | 1.00 | 1.00-1.00 | 1.00 | 3 |\n"
        "| batch 8 | prompted, P = 10 | 4.00 | 250.0 | 1.26 | 1.20-1.30 | 1.16 | 3 |\n\n"
        "## Server: the engine alone against saturated HTTP (tiny)\n\n"
        "| case | variant | ms/image | images/s | ratio | quartiles | p50 ms | rounds |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| 64 JPEG files | engine alone | 10.00 | 100.0 | 1.00 | 1.00-1.00 |  | 2 |\n"
        "| 64 JPEG files | 8 clients | 20.00 | 50.0 | 2.00 | 2.00-2.00 | 160.00 | 2 |\n"
    )


def test_files(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    assert (tmp_path / "tables.md").read_text() == REPORT.markdown()
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written) == {"machine", "plan", "results"}
    assert written["machine"] == REPORT.machine
    assert written["plan"]["repeats"] == 3
    assert written["results"][1] == {
        "benchmark": "forward",
        "backbone": "tiny",
        "case": "batch 8",
        "variant": "prompted, P = 10",
        "seconds": 0.004,
        "images_per_second": 250.0,
        "rounds": 3,
        "ratio": {"median": 1.256, "q1": 1.2, "q3": 1.3},
        "extra": {"FLOP ratio": 1.16},
    }


def test_machine_facts_name_versions_but_no_machine() -> None:
    facts = machine_facts("cpu")
    names = {"date", "cpu", "cores", "device", "threads", "load_before", "python", "torch", "timm", "litserve"}
    assert set(facts) == names | {"gpt-serve", "onnxruntime"}
    assert facts["device"] == "cpu" and facts["threads"] == 1 and facts["cpu"]
    json.dumps(facts)


def test_unwritable_folders_are_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another --output"):
        make_folder(tmp_path / "file")
    (tmp_path / "tables.md").mkdir()
    with pytest.raises(UsageError, match="tables.md cannot be written"):
        REPORT.write(tmp_path)
