"""Saturate servers whose engine answers at once, with different numbers of HTTP processes, in turns."""

import json
import multiprocessing
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click

from gpt_serve.bench.http import BOUNDARY, form
from gpt_serve.bench.setting import photo

START_SECONDS = 120
TICK = os.sysconf("SC_CLK_TCK")
FORMS = ("raw", "multipart")


@dataclass
class Server:
    """A server with ``fronts`` HTTP processes.

    Attributes:
        rates: requests a second of each run, by the form of the requests.
        cpu: milliseconds of CPU per request of each run, by form and by process: ``front`` (all of them together) and
            ``desk``, the process that starts them; with one HTTP process, ``desk`` is both.
    """

    fronts: int
    port: int
    pid: int
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self, kind: str, clients: int, seconds: float) -> None:
        """Saturate it for a while."""
        before = self._seconds()
        answered, took = load(self.port, request(kind), clients, seconds)
        for part, cpu in self._seconds().items():
            self.cpu[kind, part].append(1000 * (cpu - before[part]) / answered)
        self.rates[kind].append(answered / took)

    def wait_for_all(self) -> None:
        """Until all HTTP processes are there, and the first answer is."""
        while sum(self.port in listening(pid) for pid in children(self.pid)) < (self.fronts if self.fronts > 1 else 0):
            time.sleep(0.1)
        load(self.port, request("raw"), 2, 1.0)
        time.sleep(1)

    def _seconds(self) -> dict[str, float]:
        """Of CPU, so far."""
        parts = {"desk": cpu_seconds(self.pid), "front": 0.0}
        for pid in children(self.pid):
            if self.port in listening(pid):
                parts["front"] += cpu_seconds(pid)
        return parts


@click.command()
@click.option("--fronts", multiple=True, type=int, default=(1, 2), show_default=True, help="HTTP processes; repeat.")
@click.option("--clients", type=int, default=32, show_default=True, help="Connections with one request each at a time.")
@click.option("--seconds", type=float, default=4.0, show_default=True, help="Of each run.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Of all runs, in turns.")
def main(fronts: tuple[int, ...], clients: int, seconds: float, rounds: int) -> None:
    """Print requests a second and milliseconds of CPU per request, of 13 KB JPEGs, raw and as forms."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(count)) for count in fronts]
        for _ in range(rounds + 1):
            for kind in FORMS:
                for server in servers:
                    server.run(kind, clients, seconds)
    for kind in FORMS:
        ratios = [rate / base for rate, base in zip(servers[-1].rates[kind], servers[0].rates[kind], strict=True)][1:]
        for server in servers:
            cpu = ", ".join(f"{part} {median(server.cpu[kind, part][1:]):.3f}" for part in ("desk", "front"))
            rate = median(server.rates[kind][1:])
            print(f"{kind}, {server.fronts} HTTP process(es): {rate:.0f} requests/s; CPU ms a request: {cpu}")
        over = f"{servers[-1].fronts} over {servers[0].fronts}"
        print(f"{kind}: {over}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


@contextmanager
def serving(fronts: int) -> Iterator[Server]:
    """A server of its own, ready."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = {"port": 0, "adapters": folder, "http_workers": fronts, "queue_limit": 1024}
        command = [sys.executable, "-m", "benchmarks.http.stub", json.dumps(options)]
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stderr=file)
        try:
            end = time.monotonic() + START_SECONDS
            while "ready on http://127.0.0.1:" not in log.read_text(encoding="utf-8"):
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"the server did not start: {log.read_text(encoding='utf-8')[-500:]}")
                time.sleep(0.1)
            server = Server(
                fronts,
                int(log.read_text(encoding="utf-8").partition("ready on http://127.0.0.1:")[2].partition(":")[0]),
                process.pid,
            )
            server.wait_for_all()
            yield server
        finally:
            process.terminate()
            process.wait(60)


def request(kind: str) -> bytes:
    """One HTTP request with 13 KB that begin as a JPEG does."""
    image = photo(0)[:13_000]
    if kind == "raw":
        path, media, body = "/predict/any", "image/jpeg", image
    else:
        path, media, body = "/predict", f"multipart/form-data; boundary={BOUNDARY}", form("any", image)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def load(port: int, data: bytes, clients: int, seconds: float) -> tuple[int, float]:
    """How many requests were answered with 200, and in how many seconds."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        counts = pool.starmap(_load, [(port, data, clients // 2, seconds)] * 2)
    return sum(count for count, _ in counts), max(took for _, took in counts)


def _load(port: int, data: bytes, clients: int, seconds: float) -> tuple[int, float]:
    """In one thread, which sends what it has prepared: clients that cost little leave the cores to the server."""
    selector, answered, began = selectors.DefaultSelector(), 0, time.monotonic()
    for _ in range(clients):
        sock = socket.create_connection(("127.0.0.1", port))
        selector.register(sock, selectors.EVENT_READ, bytearray())
        sock.sendall(data)
    while time.monotonic() < began + seconds or not answered:
        for key, _ in selector.select(1):
            sock, answer = key.fileobj, key.data
            assert isinstance(sock, socket.socket)
            answer += sock.recv(65536)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered {bytes(answer[:200])!r}")
            if answer.endswith(b"}"):  # of the JSON object that is the answer
                answered += 1
                answer.clear()
                sock.sendall(data)
    took = time.monotonic() - began
    for key in list(selector.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    return answered, took


def cpu_seconds(pid: int) -> float:
    """Of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text(encoding="utf-8").split()
    ]


def listening(pid: int) -> set[int]:
    """The ports that a process has open."""
    names = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()[1:]]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in names}


if __name__ == "__main__":
    main()
