"""Start and end: what a process manager sees. On a stub, see entry.py, except for the first test."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter
from tests.serve.harness import (
    START_SECONDS,
    ServerProcess,
    check_problem,
    children,
    free_port,
    is_alive,
    port_is_free,
    until,
)


@pytest.mark.slow
def test_keys_then_sigterm_drains_and_frees_the_port(tmp_path: Path, spec: BackboneSpec, image: bytes) -> None:
    """This one computes with torch; other servers with the default."""
    AdapterStore(tmp_path).publish(make_adapter(spec, "good"))
    key = {"LIT_SERVER_API_KEY": "sesame"}
    with ServerProcess(tmp_path, max_batch_size=2, engine="torch", env=key) as server:
        server.wait_ready()
        assert [line for line in server.log if line.endswith("engine: torch on cpu")]
        refused = server.predict("good", image)
        check_problem(refused, 401)
        assert "www-authenticate" in refused.headers
        check_problem(server.get("/tasks", headers={"x-api-key": "sesam"}), 401)
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        server.client.headers["x-api-key"] = "sesame"
        assert server.predict("good", image).status_code == server.get("/tasks").status_code == 200

        processes = children(server.pid)
        with ThreadPoolExecutor(8) as pool:
            with server.stopped():
                pending = [pool.submit(server.predict, "good", image) for _ in range(8)]
                until(lambda: server.in_flight() == 8)
                os.killpg(server.pid, signal.SIGTERM)  # as a service manager does: children get it too
                until(lambda: server.get("/ready").status_code == 503)
                late = server.predict("good", image)
                check_problem(late, 503)
                assert "shutting down" in late.json()["detail"]
                assert server.get("/health").status_code == 200
            assert [future.result().status_code for future in pending] == [200] * 8
        assert server.wait() == 0
        assert port_is_free(server.port)
        until(lambda: not any(is_alive(pid) for pid in processes))
        assert not [line for line in server.log if "Traceback" in line]


def test_a_killed_parent_leaves_nothing_behind(tmp_path: Path) -> None:
    """And before that, a second server on its port gives up before it loads anything."""
    with ServerProcess(tmp_path, stub=True) as server:
        server.wait_ready()
        processes = children(server.pid)
        assert len(processes) >= 2
        with ServerProcess(tmp_path, stub=True, port=server.port) as second, server.holding("hold-start"):
            assert second.wait() == 2
            assert len(second.log) == 1 and f"port {server.port}" in second.log[0] and "--port" in second.log[0]
        assert server.get("/ready").status_code == 200
        server.signal(signal.SIGKILL)
        server.process.wait()
        until(lambda: not any(is_alive(pid) for pid in processes))
        assert port_is_free(server.port)


def test_ctrl_c_while_loading(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "hold-start").touch()
    with ServerProcess(tmp_path, stub=True, port=port) as server:
        until(lambda: server.client.get(f"http://127.0.0.1:{port}/health").status_code == 200, START_SECONDS)
        check_problem(server.client.get(f"http://127.0.0.1:{port}/ready"), 503)
        check_problem(server.client.get(f"http://127.0.0.1:{port}/tasks"), 503)
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait() == 0
        assert port_is_free(port)


def test_a_backbone_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, stub=True, backbone="refused") as server:
        assert server.wait(START_SECONDS) == 2
        assert server.log == ["Error: backbone refused: it is no Vision Transformer"]


def test_the_stub_needs_no_torch(stub: ServerProcess) -> None:
    """Which is what makes these tests quick."""
    for pid in [stub.pid, *children(stub.pid)]:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_worker_is_spawned_before_torch_is_imported() -> None:
    """The parent needs torch for the store only, and imports it while the worker loads."""
    code = "import sys, gpt_serve.serve.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
