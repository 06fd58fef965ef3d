"""Each benchmark once, as short as it can be; nobody looks at the times."""

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
from gpt_serve.bench import BENCHMARKS, run_benchmarks
from gpt_serve.bench.engines import bench_engines
from gpt_serve.bench.forward import _prompted, bench_forward, flops
from gpt_serve.bench.http import bench_http, form, saturate
from gpt_serve.bench.inputs import photo
from gpt_serve.bench.mixed import answer, bench_mixed, publish
from gpt_serve.bench.timing import Plan, Ratio, Row
from gpt_serve.cli.main import bench, main
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import GPTServeError, UnknownTask
from gpt_serve.model.backbone import Backbone

SHORT = Plan(repeats=1, sample_seconds=0, load_seconds=0)


def check_comparison(rows: list[Row]) -> None:
    """One comparison: the first row is the base, and all have been timed."""
    assert len({(row.benchmark, row.backbone, row.case) for row in rows}) == 1
    assert rows[0].ratio == Ratio(1.0, 1.0, 1.0)
    assert all(row.seconds > 0 and row.rounds == SHORT.repeats for row in rows)


def test_forward(tiny: Backbone) -> None:
    rows = bench_forward(tiny, SHORT)
    assert [row.case for row in rows[::5]] == ["batch 1", "batch 8", "batch 32"]
    variants = ["timm", "prompted, P = 0", "prompted, P = 10", "prompted, P = 50", "prompted, P = 100"]
    for start in range(0, len(rows), 5):
        check_comparison(rows[start : start + 5])
        assert [row.variant for row in rows[start : start + 5]] == variants
        expected = [row.extra["FLOP ratio"] for row in rows[start : start + 5]]
        assert expected[0] == expected[1] == 1.0
        assert expected == sorted(expected) and expected[4] > 5  # 17 rows become 117


@pytest.mark.parametrize("prompts", [0, 10, 100])
def test_flops_are_those_of_the_textbook(tiny: Backbone, prompts: int) -> None:
    """Patches, then per row of each block: q, k, v and the output, scores and the mix of values, the MLP."""
    patches, width = 16, 24
    rows = 1 + patches + prompts
    expected = patches * 3 * 4 * 4 * width + 3 * rows * (4 * width**2 + 2 * rows * width + 8 * width**2)
    images = torch.zeros(2, 3, *tiny.spec.preprocess.input_size)
    assert flops(_prompted(tiny, prompts), images) == 2 * 2 * expected


def test_mixed(tiny: Backbone) -> None:
    rows = bench_mixed(tiny, SHORT, batch=6)
    variants = ["one task", "6 tasks", "6 tasks, methods and P mixed", "6 tasks, a pass for each"]
    for start, kind in ((0, "pixels"), (4, "JPEG files")):
        check_comparison(rows[start : start + 4])
        assert rows[start].case == f"batch 6, {kind}"
        assert [row.variant for row in rows[start : start + 4]] == variants


def test_engines(tiny: Backbone) -> None:
    rows = bench_engines(tiny, SHORT, batches=(1, 3))
    cases = ["batch 1, one task", "batch 1, one task, vpt-deep, P = 100"]
    cases += ["batch 3, one task", "batch 3, 3 tasks, methods and P mixed"]
    for start, case in enumerate(cases):
        check_comparison(rows[2 * start : 2 * start + 2])
        assert rows[2 * start].case == case
        assert [row.variant for row in rows[2 * start : 2 * start + 2]] == ["torch", "onnxruntime"]
    assert len(rows) == 2 * len(cases)


def test_tasks_cycle_through_the_kinds(tiny: Backbone, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    tasks = publish(tiny, store, "t", [("gated", 4), ("linear", 0)], 3)
    found = [(store.summary(task).method, store.summary(task).prompts) for task in tasks]
    assert found == [("gated", 4), ("linear", 0), ("gated", 4)]


def test_a_failed_request_ends_the_benchmark(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UnknownTask):
        answer(Engine(tiny, AdapterStore(tmp_path)), [("nobody", photo(0))])


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
    rows = bench_http(bundled, SHORT, clients=(4,))
    check_comparison(rows)
    assert [row.variant for row in rows] == ["engine alone", "4 clients"]
    assert rows[0].case == "32 JPEG files"
    assert 0 < rows[1].extra["p50 ms"] <= rows[1].extra["p95 ms"]
    assert rows[1].extra["share of the engine"] == pytest.approx(1 / rows[1].ratio.median)


def test_all_backbones_take_part_but_only_the_first_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "load", lambda name, **_: SimpleNamespace(name=name))
    for benchmark in BENCHMARKS:
        monkeypatch.setitem(BENCHMARKS, benchmark, lambda backbone, plan: [])
    said: list[str] = []
    run_benchmarks(["one", "two"], "cpu", SHORT, say=said.append)
    twice = [f"{benchmark}: {name}" for benchmark in ("forward", "mixed", "engines") for name in ("one", "two")]
    assert said == [*twice, "http: one"]
    said.clear()
    run_benchmarks(["one", "two"], "cpu", SHORT, only=["http", "mixed"], say=said.append)
    assert said == ["mixed: one", "mixed: two", "http: one"]


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
    arguments = ["--only", "mixed", "--backbone", "tiny", "--repeats", "1", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr == "mixed: tiny\n"
    assert "32 tasks, methods and P mixed" in result.stdout
    written = json.loads((output / "results.json").read_text())
    assert {row["benchmark"] for row in written["results"]} == {"mixed"}
    assert (output / "tables.md").read_text().startswith("# Results\n")


def test_command_offers_the_benchmarks_that_there_are() -> None:
    only = next(option for option in bench.params if option.name == "only")
    assert tuple(only.type.choices) == tuple(BENCHMARKS)  # type: ignore[attr-defined]
