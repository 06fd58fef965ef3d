"""What HTTP costs: the saturated server against the engine that it runs, alone, on the same requests.

The clients are threads of this process, so on a machine with few cores they take part of what the server could use;
the engine has the machine to itself.
"""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from gpt_serve.bench.engines import onnx_engine
from gpt_serve.bench.setting import Setting, answer, photo, temporary_store, write_adapters
from gpt_serve.bench.timing import Plan, Ratio, Row
from gpt_serve.engine.engine import Engine
from gpt_serve.errors import GPTServeError
from gpt_serve.model.backbone import Backbone
from gpt_serve.model.catalog import BUNDLED
from gpt_serve.serve import ServeConfig

BATCH = 32
ENGINE = "engine alone"
START_SECONDS = 180
PATIENCE = 600  # seconds for an answer: slow is a result, too
BOUNDARY = "gpt-serve-bench"

Request = tuple[str, bytes]


def bench_http(setting: Setting) -> list[Row]:
    """Compare JPEG files for `BATCH` tasks in batches through the engine, and from several clients over HTTP."""
    backbone, plan, clients = setting.backbone, setting.plan, setting.scale.clients
    with temporary_store(backbone) as store:
        adapters = write_adapters(store, backbone, "alike", BATCH)
        pool = [(adapter.task, photo(seed)) for seed, adapter in enumerate(adapters)]
        onnx = ServeConfig(device=str(backbone.device)).chosen_engine == "onnx"
        engine = onnx_engine(backbone, store, BATCH) if onnx else Engine(backbone, store, max_batch=BATCH)
        requests = list(islice(cycle(pool), _count(engine, pool, plan, max(clients))))
        with _server(backbone, store.root.parent) as port:
            return _compare(setting, engine, requests, port)


def _compare(setting: Setting, engine: Engine, requests: Sequence[Request], port: int) -> list[Row]:
    bodies = [form(*request) for request in requests]
    latencies: dict[str, list[list[float]]] = {f"{count} clients": [] for count in setting.scale.clients}
    calls: dict[str, Callable[[], object]] = {ENGINE: partial(answer, engine, requests)}
    for count, (variant, runs) in zip(setting.scale.clients, latencies.items(), strict=True):
        calls[variant] = _load(port, bodies, count, runs)
    times = setting.time(calls)
    extra = {}
    for variant, runs in latencies.items():
        share = {"share of the engine": 1 / Ratio.of(times[variant], times[ENGINE]).median}
        extra[variant] = _percentiles(runs[1:]) | share  # the first run was the warm-up
    return setting.rows("http", f"{len(requests)} JPEG files", len(requests), times, extra)


def _load(port: int, bodies: Sequence[bytes], clients: int, runs: list[list[float]]) -> Callable[[], None]:
    return lambda: runs.append(saturate(port, bodies, clients))


def _percentiles(runs: Sequence[Sequence[float]]) -> dict[str, float]:
    p50, p95 = np.quantile(np.concatenate(runs), [0.5, 0.95]).tolist()
    return {"p50 ms": 1000 * p50, "p95 ms": 1000 * p95}


def _count(engine: Engine, pool: Sequence[Request], plan: Plan, clients: int) -> int:
    """Return how many requests keep the engine busy for ``plan.load_seconds``: whole batches, 4 or more per client."""
    answer(engine, pool)
    began = time.perf_counter()
    answer(engine, pool)
    seconds = time.perf_counter() - began
    batches = max(plan.load_seconds / seconds, 4 * clients / len(pool), 1)
    return int(batches) * len(pool)


def saturate(port: int, bodies: Sequence[bytes], clients: int) -> list[float]:
    """Post all ``bodies`` to 127.0.0.1 from ``clients`` threads, each waiting for an answer before it asks again.

    Returns:
        Seconds from the first byte sent to the last byte received, of each request.

    Raises:
        GPTServeError: an answer was not 200.
    """
    queue = iter(bodies)  # a list's iterator is safe to share

    def client() -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            return [_post(connection, body) for body in queue]
        finally:
            connection.close()

    with ThreadPoolExecutor(clients) as threads:
        jobs = [threads.submit(client) for _ in range(clients)]
    return [seconds for job in jobs for seconds in job.result()]


def _post(connection: http.client.HTTPConnection, body: bytes) -> float:
    began = time.perf_counter()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    connection.request("POST", "/predict", body, headers)
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        raise GPTServeError(f"the benchmark's server answered {response.status}: {text[:200].decode(errors='replace')}")
    return time.perf_counter() - began


def form(task: str, image: bytes) -> bytes:
    """Return the body of ``POST /predict``."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="task"\r\n\r\n{task}\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image.jpg"\r\n\r\n'
    )
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextmanager
def _server(backbone: Backbone, folder: Path) -> Iterator[int]:
    """Run ``gpt-serve serve`` with ``backbone``'s very weights and the adapters in ``folder``; give its port."""
    options = ["--port", "0", "--adapters", str(folder / "adapters"), "--backbone", backbone.name]
    options += ["--device", str(backbone.device), "--max-batch-size", str(BATCH), "--deadline", str(PATIENCE)]
    environment = dict(os.environ)
    if backbone.name not in BUNDLED:
        environment["XDG_CACHE_HOME"] = str(folder)  # where the graph of these weights is
        save_file(backbone.timm_model.state_dict(), folder / "weights.safetensors")
        options += ["--checkpoint", str(folder / "weights.safetensors")]
    log = folder / "server.log"
    command = [sys.executable, "-c", "from gpt_serve.cli.main import main; main()", "serve", *options]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stderr=file, env=environment)
    try:
        yield _wait_ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """Wait for the server's ready line and return the port that it names."""
    end = time.monotonic() + START_SECONDS
    while True:
        text = log.read_text(encoding="utf-8", errors="replace")
        _, found, rest = text.partition("ready on http://127.0.0.1:")
        port, colon, _ = rest.partition(":")
        if found and colon:
            return int(port)
        if process.poll() is not None or time.monotonic() > end:
            last = text.strip().splitlines()
            raise GPTServeError(f"the benchmark's server did not start: {last[-1] if last else 'it said nothing'}")
        time.sleep(0.05)
