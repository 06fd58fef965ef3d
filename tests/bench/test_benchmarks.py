"""Every benchmark measures what it says, and the command writes what was measured."""

import dataclasses
import http.server
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.bench import BENCHMARKS, ONLY_NAMED, bank, peers, run_benchmarks, soak
from gpt_serve.bench.authors import AuthorsModel
from gpt_serve.bench.curves import bench_mixed, flops
from gpt_serve.bench.engines import bench_engines
from gpt_serve.bench.http import bench_http, form, saturate
from gpt_serve.bench.plots import draw
from gpt_serve.bench.report import Record, markdown, read, save
from gpt_serve.bench.setting import (
    FULL,
    Setting,
    answer,
    photo,
    temporary_store,
    untrained_adapter,
    write_adapters,
)
from gpt_serve.bench.timing import Plan, Ratio, Row
from gpt_serve.cli.main import bench, main
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import GPTServeError, UnknownTask
from gpt_serve.model.backbone import Backbone

SHORT = Plan(repeats=1, sample_seconds=0, load_seconds=0)
FEW = dataclasses.replace(
    FULL,
    batch=4,
    few_tasks=2,
    long_batch=2,
    task_counts=(1, 4),
    swapped_counts=(1,),
    prompt_counts=(0, 5),
    prompt_batches=(1, 2),
    engine_batches=(1, 3),
    bank_counts=(1, 5),
    bank_batches=1,
    cold=4,
    clients=(4,),
)


@pytest.fixture
def setting(tiny: Backbone) -> Setting:
    """A setting with few points."""
    return Setting(tiny, SHORT, FEW)


@pytest.fixture
def quick_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small bank, and no PEFT and onnxruntime, which take seconds to begin."""
    monkeypatch.setattr(bank, "HELD", 3)
    monkeypatch.setattr(bank, "BATCH", 8)
    for module in ("peers", "curves"):
        monkeypatch.setattr(f"gpt_serve.bench.{module}.lora_model", lambda *_: None)
    monkeypatch.setattr(peers, "onnx_engine", lambda backbone, store, _: Engine(backbone, store))


def check_comparison(rows: list[Row]) -> None:
    """One comparison: the first row is the base, and all have been timed."""
    assert len({(row.benchmark, row.backbone, row.case) for row in rows}) == 1
    assert rows[0].ratio == Ratio(1.0, 1.0, 1.0)
    assert all(row.seconds > 0 and row.rounds > 0 for row in rows)


@pytest.mark.usefixtures("quick_peers")
def test_every_benchmark_gives_comparisons(setting: Setting, tmp_path: Path) -> None:
    """Then they are written, read and drawn."""
    records = []
    for name in ("peers", "tasks", "prompts", "bank", "cold", "overhead"):
        rows = BENCHMARKS[name][0](setting)
        assert {row.benchmark for row in rows} == {name}
        for case in {row.case for row in rows}:
            check_comparison([row for row in rows if row.case == case])
        records.append(Record(name, "tiny", {"device": "cpu", "load_before": 0.5}, SHORT, rows))
    assert [row.variant for row in records[1].rows] == ["engine, 1", "engine, 4", "swapped, grouped by task, 1"]
    assert [row.case for row in records[3].rows[::3]] == [
        "1 on disk, uniform",
        "1 on disk, Zipf(1.1)",
        "5 on disk, uniform",
        "5 on disk, Zipf(1.1)",
    ]
    save(tmp_path, records)
    assert read(tmp_path) == records
    assert markdown(records) == (tmp_path / "tables.md").read_text()
    draw(records, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"peers", "tasks", "prompts", "bank"}


@pytest.mark.parametrize("prompts", [0, 10, 100])
def test_flops_are_those_of_the_textbook(tiny: Backbone, prompts: int) -> None:
    """Patches, then per row of each block: q, k, v and the output, scores and the mix of values, the MLP."""
    patches, width, classes = 16, 24, 20
    rows = 1 + patches + prompts
    expected = patches * 3 * 4 * 4 * width + 3 * rows * (4 * width**2 + 2 * rows * width + 8 * width**2)
    run, head = tiny.timm_model, 0
    if prompts:
        run, head = AuthorsModel(tiny, untrained_adapter(tiny, "some", prompts=prompts)), classes * width
    images = torch.zeros(2, 3, *tiny.spec.preprocess.input_size)
    assert flops(run, images) == 2 * 2 * (expected + head)


def test_mixed(setting: Setting) -> None:
    rows = bench_mixed(setting, batch=6)
    variants = ["one task", "6 tasks", "6 tasks, methods and P mixed", "6 tasks, a pass for each"]
    for start, kind in ((0, "pixels"), (4, "JPEG files")):
        check_comparison(rows[start : start + 4])
        assert rows[start].case == f"batch 6, {kind}"
        assert [row.variant for row in rows[start : start + 4]] == variants


@pytest.mark.slow
def test_engines(setting: Setting) -> None:
    rows = bench_engines(setting)
    cases = ["batch 1, one task", "batch 1, one task, vpt-deep, P = 100"]
    cases += ["batch 3, one task", "batch 3, 3 tasks, methods and P mixed"]
    for start, case in enumerate(cases):
        check_comparison(rows[2 * start : 2 * start + 2])
        assert rows[2 * start].case == case
        assert [row.variant for row in rows[2 * start : 2 * start + 2]] == ["torch", "onnxruntime"]
    assert len(rows) == 2 * len(cases)


def test_tasks_cycle_through_the_kinds(tiny: Backbone) -> None:
    with temporary_store(tiny) as store:
        adapters = write_adapters(store, tiny, "t", 3, [("gated", 4), ("linear", 0)])
        assert [(adapter.method, adapter.prompts) for adapter in adapters] == [
            ("gated", 4),
            ("linear", 0),
            ("gated", 4),
        ]
        assert store.load("t-1").adapter.to_bytes() == adapters[1].to_bytes()


def test_a_failed_request_ends_the_benchmark(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UnknownTask):
        answer(Engine(tiny, AdapterStore(tmp_path)), [("nobody", photo(0))])


def test_the_soak_fails_when_the_process_grows(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture
def stub() -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server that answers 200 to bodies without the word ``bad``, and the bodies it got."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(503 if b"bad" in bodies[-1] else 200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"text")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_port, bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_clients_send_every_body_once(stub: tuple[int, list[bytes]]) -> None:
    port, received = stub
    sent = [b"%d" % number for number in range(20)]
    latencies = saturate(port, sent, clients=3)
    assert sorted(received) == sorted(sent)
    assert len(latencies) == 20 and all(seconds > 0 for seconds in latencies)


def test_a_refused_request_ends_the_benchmark(stub: tuple[int, list[bytes]]) -> None:
    with pytest.raises(GPTServeError, match="answered 503: text"):
        saturate(stub[0], [b"good", b"bad"], clients=1)


def test_form_is_what_a_browser_sends() -> None:
    lines = form("birds", b"\xff\xd8").split(b"\r\n")
    assert [line for line in lines if b"name=" in line] == [
        b'Content-Disposition: form-data; name="task"',
        b'Content-Disposition: form-data; name="image"; filename="image.jpg"',
    ]
    assert b"birds" in lines and b"\xff\xd8" in lines


@pytest.mark.slow
def test_http(bundled: Backbone) -> None:
    rows = bench_http(Setting(bundled, SHORT, FEW))
    check_comparison(rows)
    assert [row.variant for row in rows] == ["engine alone", "4 clients"]
    assert rows[0].case == "32 JPEG files"
    assert 0 < rows[1].extra["p50 ms"] <= rows[1].extra["p95 ms"]
    assert rows[1].extra["share of the engine"] == pytest.approx(1 / rows[1].ratio.median)


@pytest.fixture
def unmeasured(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks that only say on what they ran."""
    monkeypatch.setattr(
        Backbone, "load", lambda name, **_: SimpleNamespace(name=name, spec=tiny.spec, device=tiny.device)
    )
    for name in BENCHMARKS:
        monkeypatch.setitem(BENCHMARKS, name, (lambda setting: [], ("one", "two")))


@pytest.mark.usefixtures("unmeasured")
def test_benchmarks_run_on_their_own_backbones_or_on_those_named() -> None:
    def run(only: list[str], backbones: list[str]) -> list[tuple[str, str]]:
        said: list[str] = []
        records = list(run_benchmarks(only, backbones, "cpu", SHORT, said.append))
        assert said == [f"{record.name}: {record.backbone}" for record in records]
        return [(record.name, record.backbone) for record in records]

    every = [name for name in BENCHMARKS if name not in ONLY_NAMED]
    assert run([], []) == [(name, backbone) for name in every for backbone in ("one", "two")]
    assert run(["soak", "http"], ["three"]) == [("soak", "three"), ("http", "three")]


@pytest.fixture
def process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command changes settings of its process, which here runs other tests too."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("process_settings")
def test_command(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "load", lambda name, **_: tiny)
    output = tmp_path / "new" / "results"
    options = ["--backbone", "tiny", "--repeats", "1", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(main, ["bench", "--only", "mixed", *options])
    assert result.exit_code == 0, result.output
    assert result.stderr == "mixed: tiny\n"
    assert "32 tasks, methods and P mixed" in result.stdout
    assert (output / "tables.md").read_text().startswith("# Results\n")
    monkeypatch.setitem(BENCHMARKS, "cold", (lambda setting: [], ()))
    again = CliRunner().invoke(main, ["bench", "--only", "cold", *options])
    assert again.exit_code == 0, again.output
    assert [record["name"] for record in json.loads((output / "results.json").read_text())] == ["mixed", "cold"]


@pytest.mark.usefixtures("process_settings")
@pytest.mark.parametrize("content", ["no JSON", "{}", "[1]", '[{"name": "mixed"}]'])
def test_results_of_something_else_are_left_alone(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BENCHMARKS, "mixed", (lambda setting: [], ()))
    (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(main, ["bench", "--only", "mixed", "--device", "cpu", "--output", str(tmp_path)])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "name another --output" in result.stderr
    assert (tmp_path / "results.json").read_text() == content


def test_command_offers_the_benchmarks_that_there_are() -> None:
    only = next(option for option in bench.params if option.name == "only")
    assert tuple(only.type.choices) == tuple(BENCHMARKS)  # type: ignore[attr-defined]
    assert f"all but {' and '.join(ONLY_NAMED)}]" in (only.help or "")  # type: ignore[attr-defined]
