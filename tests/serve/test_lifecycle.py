"""Start and end: what a process manager sees."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gpt_serve.adapters.store import AdapterStore
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter
from tests.serve.harness import ServerProcess, check_problem, children, is_alive, port_is_free, until

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path, spec: BackboneSpec) -> Path:
    for task in ("good", "sleepy-a"):
        AdapterStore(tmp_path).publish(make_adapter(spec, task, seed=0))
    return tmp_path


def test_keys_then_sigterm_drains_and_frees_the_port(store: Path, image: bytes) -> None:
    """And this one computes with torch; the other servers of these tests with the default."""
    key = {"LIT_SERVER_API_KEY": "sesame"}
    with ServerProcess(store, trouble=True, max_batch_size=2, engine="torch", env=key) as server:
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
            # Two to a batch of 0.4 s: the last is answered more than a second after the signal.
            pending = [pool.submit(server.predict, "sleepy-a", image) for _ in range(8)]
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
        assert not any(is_alive(pid) for pid in processes)
        assert not [line for line in server.log if "Traceback" in line]


def test_a_killed_parent_leaves_nothing_behind(store: Path) -> None:
    """And before that: the port answers while the backbone loads, and a second server on it gives up at once."""
    with ServerProcess(store, trouble=True, engine="torch") as server:
        server.wait_ready()
        processes = children(server.pid)
        assert len(processes) >= 2
        started = time.monotonic()
        with ServerProcess(store, port=server.port) as second:
            assert second.wait() == 2
            assert len(second.log) == 1 and f"port {server.port}" in second.log[0] and "--port" in second.log[0]
        assert time.monotonic() - started < 20
        assert server.get("/ready").status_code == 200
        server.signal(signal.SIGKILL)
        server.process.wait()
        until(lambda: not any(is_alive(pid) for pid in processes))
        assert port_is_free(server.port)


def test_ctrl_c_while_loading(tmp_path: Path) -> None:
    port = free_port()
    with ServerProcess(tmp_path, port=port, engine="torch") as server:
        until(lambda: server.client.get(f"http://127.0.0.1:{port}/health").status_code == 200, 60)
        check_problem(server.client.get(f"http://127.0.0.1:{port}/ready"), 503)
        check_problem(server.client.get(f"http://127.0.0.1:{port}/tasks"), 503)
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait() == 0
        assert port_is_free(port)


def test_a_backbone_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, backbone="resnet18") as server:
        assert server.wait(60) == 2
        assert len(server.log) == 1 and server.log[0].startswith("Error: ") and "resnet18" in server.log[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_onnxruntime_without_cuda_is_refused_in_one_line(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, engine="onnx", device="cuda") as server:
        assert server.wait(60) == 2
        assert "use cpu" in server.log[-1] and server.log[-1].startswith("Error: ")
        assert not [line for line in server.log[:-1] if "building the ONNX graph" not in line]


def test_the_worker_is_spawned_before_torch_is_imported() -> None:
    """The parent needs torch for the store only, and imports it while the worker loads."""
    code = "import sys, gpt_serve.serve.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
