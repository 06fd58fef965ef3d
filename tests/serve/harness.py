"""Start a server process, talk to it from outside, and be sure that it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

ENTRY = Path(__file__).with_name("entry.py")
START_SECONDS = 90  # a server takes about 5 s; busy machines several times that


class ServerProcess:
    """A server on a free port of 127.0.0.1, with its log."""

    def __init__(self, adapters: Path, *, env: dict[str, str] | None = None, **options: Any) -> None:
        self.adapters = adapters
        options = {"port": 0, "adapters": str(adapters), "drain": 20} | options
        self.process = subprocess.Popen(
            [sys.executable, str(ENTRY), json.dumps(options)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        )
        self.log: list[str] = []
        self.reader = threading.Thread(target=self._read_log, daemon=True)
        self.reader.start()
        # A connection per request: httpcore may close an idle one that another thread has just been given.
        self.client = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        """From the ready line; call `wait_ready` first."""
        return next(line for line in self.log if "ready on http" in line).split("ready on ")[1].split(": ")[0]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait_ready(self, seconds: float = START_SECONDS) -> "ServerProcess":
        until(lambda: self.process.poll() is not None or any("ready on http" in line for line in self.log), seconds)
        assert self.process.poll() is None, self.log
        until(lambda: self.get("/ready").status_code == 200, seconds)
        return self

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.client.get(self.url + path, **kwargs)

    def predict(self, task: str, image: bytes, **data: str) -> httpx.Response:
        return self.client.post(self.url + "/predict", data={"task": task} | data, files={"image": ("image", image)})

    def predict_all(self, requests: list[tuple[str, bytes]]) -> list[httpx.Response]:
        """All at once, each on a thread of its own; answers in order."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self.predict(*request), requests))

    def metric(self, name: str) -> float:
        """The value of one sample of ``/metrics``, 0 when it does not exist yet."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    @contextmanager
    def holding(self, name: str = "hold") -> Iterator[None]:
        """While it lasts, a stub does not answer ``held-*``; with ``hold-start``, its workers do not load."""
        (self.adapters / name).touch()
        try:
            yield
        finally:
            (self.adapters / name).unlink()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """While it lasts, the worker takes nothing from its pipe: what is sent meanwhile waits there."""
        worker = self.worker_pid()
        os.kill(worker, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # it was killed
                os.kill(worker, signal.SIGCONT)

    def in_flight(self) -> float:
        return self.metric("gpt_serve_in_flight")

    def worker_pid(self) -> int:
        """The child that has the engine: by far the largest."""
        return max(children(self.pid), key=resident_pages)

    def signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def wait(self, seconds: float = 30) -> int:
        """The exit code, once the process has ended by itself."""
        code = self.process.wait(seconds)
        self.reader.join(seconds)
        return code

    def stop(self) -> None:
        """End everything, for clean-up only."""
        self.client.close()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(25)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
                self.process.wait()
        self.reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def until(condition: Any, seconds: float = 20) -> None:
    """Wait for ``condition()`` to hold; a failed connection counts as not yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"{condition} did not hold within {seconds} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def children(pid: int) -> list[int]:
    """The direct children of a process, all of its threads' included."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def port_is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen()
        except OSError:
            return False
        return True


def raw(port: int, data: bytes, seconds: float = 10) -> bytes:
    """The start of what the server says to bytes that no client library would send; empty if it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        try:
            sock.sendall(data)
            return sock.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            return b""


def check_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Assert that ``response`` is an RFC 9457 problem with this status, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "detail"} and body["status"] == status
    assert body["title"] and body["detail"] and "\n" not in body["detail"]
    assert ("retry-after" in response.headers) is (status == 503)
    return body


def serving(adapters: Path, **options: Any) -> Iterator[ServerProcess]:
    """The body of a fixture."""
    # Of several processes one builds the graph of a backbone; the others find it in the cache.
    with FileLock(Path(os.environ["XDG_CACHE_HOME"]) / "server.lock"):
        server = ServerProcess(adapters, **options)
        try:
            server.wait_ready()
        except BaseException:
            server.stop()
            raise
    with server:
        yield server
