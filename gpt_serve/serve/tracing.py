"""OpenTelemetry by its standard variables, such as ``OTEL_EXPORTER_OTLP_ENDPOINT`` and ``OTEL_SERVICE_NAME``.

FastAPI does the work: a span for each request, which continues the one that a ``traceparent`` header names, and metrics
of requests. Without an endpoint nothing is recorded or sent.
"""

import os
from importlib.util import find_spec

from fastapi.telemetry import TelemetryConfig

from gpt_serve.errors import UsageError

_ENDPOINTS = [f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT" for signal in ("", "TRACES_", "METRICS_", "LOGS_")]


def telemetry() -> TelemetryConfig:
    """What FastAPI is to do. Raises `UsageError` when the environment asks for what is not installed."""
    named = [variable for variable in _ENDPOINTS if os.environ.get(variable)]
    if named and not _can_send():
        raise UsageError(f"{named[0]} is set, but nothing is there to send with: pip install 'gpt-serve[otel]'")
    os.environ.setdefault("OTEL_SERVICE_NAME", "gpt-serve")
    return {"auto_configure": True, "exclude": _is_probe}


def _can_send() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # one of the packages around it
        return False


def _is_probe(scope: object) -> bool:
    """Probes come every few seconds, and say nothing."""
    return isinstance(scope, dict) and scope.get("path") in ("/health", "/ready", "/metrics")
