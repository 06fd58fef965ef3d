"""The routes. They know whom to ask, the store and a state, and not who runs the engine: see `Door`."""

import asyncio
import hmac
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI, Request
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from gpt_serve import __version__
from gpt_serve.errors import DeadlineExceeded, GPTServeError, InvalidRequest
from gpt_serve.serve import problems, schema
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.inputs import read_request
from gpt_serve.serve.messages import Answer, Asks, Item
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.pages import add_pages
from gpt_serve.serve.problems import HTTPError
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.tracing import telemetry
from gpt_serve.specs import check_task_name

if TYPE_CHECKING:
    from gpt_serve.adapters.store import AdapterStore

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_key_header = APIKeyHeader(name="X-API-Key", auto_error=False)


@dataclass
class Door:
    """What the routes need of the rest.

    Attributes:
        config: the limits, the deadline and the key.
        asks: who answers items.
        state: whether requests are taken on, and how many there are.
        metrics: what ``/metrics`` shows.
    """

    config: ServeConfig
    asks: Asks
    state: ServerState
    metrics: Metrics
    _store: "AdapterStore | None" = field(default=None, init=False)

    @property
    def store(self) -> "AdapterStore":
        """The adapters, checked against the backbone. Raises `NotReady` until a worker has loaded it once."""
        if self._store is None:
            if self.state.spec is None:
                self.state.check_ready()
            from gpt_serve.adapters.store import AdapterStore  # torch: imported while the worker loads

            self._store = AdapterStore(self.config.adapters, self.state.spec, poll_seconds=self.config.poll_seconds)
        return self._store


def build_app(door: Door, lifespan: Lifespan | None = None) -> FastAPI:
    """The HTTP interface of what ``door`` leads to; ``lifespan`` runs what must run beside it."""
    app = FastAPI(
        title="GPT-Serve",
        version=__version__,
        description="Many vision tasks from one frozen Vision Transformer.",
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry=telemetry(),
        docs_url=None,  # FastAPI's would load its scripts from elsewhere
        redoc_url=None,
    )
    problems.install(app)
    add_pages(app)
    _add_probes(app, door)
    guarded = [Depends(_key_check(door.config.api_key))]

    @app.post("/predict", dependencies=guarded, **schema.PREDICT)
    async def predict(request: Request) -> Response:
        """Classify one image with the adapter of one task."""
        return await Call(door, request).response()

    @app.get("/tasks", dependencies=guarded, **schema.TASKS)
    async def tasks() -> Response:
        """List the stored adapters; one that cannot be served is listed with the reason."""
        entries = await asyncio.to_thread(door.store.describe)
        return JSONResponse({"tasks": [entry.to_dict() for entry in entries]})

    @app.get("/tasks/{task}", dependencies=guarded, **schema.TASK)
    async def task(task: str) -> Response:
        """Describe one adapter, with its labels."""
        summary = await asyncio.to_thread(door.store.summary, check_task_name(task))
        return JSONResponse(summary.to_dict() | {"labels": list(summary.labels)})

    return app


def _add_probes(app: FastAPI, door: Door) -> None:
    @app.get("/health", **schema.HEALTH)
    async def health() -> Response:
        """Whether the process answers at all. Never needs a key."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready", **schema.READY)
    async def ready() -> Response:
        """Whether a prediction would be taken on now: the worker holds the backbone and nobody asked it to stop."""
        door.state.check_ready()
        spec = door.state.spec
        assert spec is not None
        return JSONResponse({"status": "ready", "backbone": spec.name, "backbone_sha256": spec.fingerprint})

    @app.get("/metrics", **schema.METRICS)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(door.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class Call:
    """One ``POST /predict`` from admission to answer."""

    def __init__(self, door: Door, request: Request) -> None:
        self.door = door
        self.request = request
        self.started = time.monotonic()
        self.expires = self.started + door.config.deadline
        self.task = ""  # once it is known to exist: the label of the metrics

    async def response(self) -> Response:
        """The answer or the problem, counted."""
        try:
            answer = await self._answer()
            response = Response(answer.content, media_type=answer.media_type)
        except (GPTServeError, HTTPError) as error:
            response = problems.problem_of(error)
        self.door.metrics.answered(self.task, response.status_code, time.monotonic() - self.started)
        return response

    async def _answer(self) -> Answer:
        """The slot is taken before the body is read, so that bodies in memory are bounded too."""
        state = self.door.state
        state.admit()
        try:
            item = await self._read()
            state.assign(self.task)
        except BaseException:
            state.release()
            raise
        # The job outlives this call when the deadline passes: its slot is free once the worker is done with it.
        job = self.door.asks.ask(item)
        job.add_done_callback(self._finish)
        try:
            async with asyncio.timeout_at(self._loop_deadline()):
                return await asyncio.shield(job)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {self.door.config.deadline:g} s: try again later") from None

    async def _read(self) -> Item:
        limits = self.door.config
        try:
            async with asyncio.timeout_at(self._loop_deadline()):
                wanted = await read_request(self.request, limits.max_body_bytes)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {limits.deadline:g} s") from None
        self.door.store.signature(wanted.task)
        self.task = wanted.task
        return Item(wanted.task, wanted.image, wanted.top_k, self.expires)

    def _finish(self, job: "asyncio.Future[Answer]") -> None:
        self.door.state.release(self.task)
        job.exception()  # when nobody waits for the answer any more, nobody need hear of it

    def _loop_deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.expires - time.monotonic()


def _key_check(expected: str | None) -> Callable[..., None]:
    def check(key: str | None = Depends(_key_header)) -> None:
        if expected is not None and not hmac.compare_digest((key or "").encode(), expected.encode()):
            raise HTTPError(401, "give the server's key in the X-API-Key header", {"WWW-Authenticate": "APIKey"})

    return check
