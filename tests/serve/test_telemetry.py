"""A server at work keeps no device id; look-ups are watched in tests/test_telemetry.py."""

from pathlib import Path

from tests.serve.harness import ServerProcess


def test_a_server_that_has_answered_keeps_no_device_id(server: ServerProcess, image: bytes, cache: Path) -> None:
    assert server.predict("birds", image).status_code == 200
    assert any("engine: onnxruntime" in line for line in server.log)
    assert list(cache.rglob("deviceid")) == []
