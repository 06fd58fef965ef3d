"""OpenTelemetry, seen by a collector: spans and metrics arrive where the standard variables say."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpt_serve.errors import UsageError
from gpt_serve.serve import tracing
from tests.serve.harness import ServerProcess, until

pytestmark = pytest.mark.slow

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP: keeps the bodies by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taker)
        self.taken: list[tuple[str, bytes]] = []


class Taker(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.taken.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def spans(collector: Collector) -> list[Any]:
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    found = []
    for path, body in collector.taken:
        if path == "/v1/traces":
            for group in messages.ExportTraceServiceRequest.FromString(body).resource_spans:
                of = {entry.key: entry.value.string_value for entry in group.resource.attributes}
                found += [(of["service.name"], span) for scope in group.scope_spans for span in scope.spans]
    return found


def test_a_span_continues_the_callers_trace(collector: Collector, adapters: Path, image: bytes) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with ServerProcess(adapters, env=env, engine="torch") as server:
        server.wait_ready()
        response = server.client.post(
            server.url + "/predict",
            data={"task": "birds"},
            files={"image": ("image", image)},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
        )
        assert response.status_code == 200
        server.get("/health")
        until(lambda: any(span.name == "POST /predict" for _, span in spans(collector)))
    named = {span.name: (service, span) for service, span in spans(collector)}
    service, span = named["POST /predict"]
    assert service == "gpt-serve"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    attributes = {entry.key: entry.value for entry in span.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert not [name for name in named if "health" in name or "ready" in name]
    assert any(path == "/v1/metrics" for path, _ in collector.taken)  # at the latest when the server ends


def test_without_an_endpoint_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in tracing._ENDPOINTS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    assert tracing.telemetry()["auto_configure"]


def test_what_is_missing_is_said_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/v1/traces")
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"TRACES_ENDPOINT is set, .* pip install 'gpt-serve\[otel\]'"):
        tracing.telemetry()
