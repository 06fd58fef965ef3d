"""The routes."""

import asyncio
import hmac
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from gpt_serve import __version__
from gpt_serve.errors import DeadlineExceeded, GPTServeError, InvalidRequest
from gpt_serve.serve import problems, schema
from gpt_serve.serve.inputs import read_request
from gpt_serve.serve.problems import HTTPError, by_name
from gpt_serve.serve.server import Server
from gpt_serve.serve.worker import Item, Reply
from gpt_serve.specs import check_task_name

if TYPE_CHECKING:
    from gpt_serve.adapters.store import AdapterStore

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_key_header = APIKeyHeader(name="X-API-Key", auto_error=False)


def build_app(server: Server, lifespan: Lifespan) -> FastAPI:
    """The HTTP interface of ``server``; ``lifespan`` runs its supervisor."""
    app = FastAPI(
        title="GPT-Serve",
        version=__version__,
        description="Many vision tasks from one frozen Vision Transformer.",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    problems.install(app)
    _add_probes(app, server)
    guarded = [Depends(_key_check(server.config.api_key))]

    @app.post("/predict", dependencies=guarded, **schema.PREDICT)
    async def predict(request: Request) -> Response:
        """Classify one image with the adapter of one task."""
        return await Call(server, request).response()

    @app.get("/tasks", dependencies=guarded, **schema.TASKS)
    async def tasks() -> Response:
        """The stored adapters; one that cannot be served is listed with the reason."""
        store = _store(server)
        return JSONResponse({"tasks": [entry.to_dict() for entry in await asyncio.to_thread(store.describe)]})

    @app.get("/tasks/{task}", dependencies=guarded, **schema.TASK)
    async def task(task: str) -> Response:
        """One adapter, with its labels."""
        summary = await asyncio.to_thread(_store(server).summary, check_task_name(task))
        return JSONResponse(summary.to_dict() | {"labels": list(summary.labels)})

    return app


def _add_probes(app: FastAPI, server: Server) -> None:
    @app.get("/health", **schema.HEALTH)
    async def health() -> Response:
        """Whether the process answers at all. Never needs a key."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready", **schema.READY)
    async def ready() -> Response:
        """Whether a prediction would be taken on now: the worker holds the backbone and nobody asked it to stop."""
        server.state.check_ready()
        assert server.spec is not None
        return JSONResponse(
            {"status": "ready", "backbone": server.spec.name, "backbone_sha256": server.spec.fingerprint}
        )

    @app.get("/metrics", **schema.METRICS)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class Call:
    """One ``POST /predict`` from admission to answer."""

    def __init__(self, server: Server, request: Request) -> None:
        self.server = server
        self.request = request
        self.started = time.monotonic()
        self.expires = self.started + server.config.deadline
        self.task = ""  # once it is known to exist: the label of the metrics

    async def response(self) -> Response:
        """The answer or the problem, counted."""
        try:
            response: Response = JSONResponse(await self._answer())
        except (GPTServeError, HTTPError) as error:
            response = problems.problem_of(error)
        self.server.metrics.answered(self.task, response.status_code, time.monotonic() - self.started)
        return response

    async def _answer(self) -> Any:
        """The slot is taken before the body is read, so that bodies in memory are bounded too."""
        state = self.server.state
        state.admit()
        try:
            item = await self._read()
            state.assign(self.task)
        except BaseException:
            state.release()
            raise
        # The job outlives this call when the deadline passes: its slot is free once the worker is done with it.
        job = self.server.ask(item)
        job.add_done_callback(self._finish)
        try:
            async with asyncio.timeout_at(self._loop_deadline()):
                kind, value = await asyncio.shield(job)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {self.server.config.deadline:g} s: try again later") from None
        if kind:
            raise by_name(kind, value)
        return value

    async def _read(self) -> Item:
        try:
            async with asyncio.timeout_at(self._loop_deadline()):
                wanted = await read_request(self.request, self.server.config.max_body_bytes)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {self.server.config.deadline:g} s") from None
        _store(self.server).signature(wanted.task)
        self.task = wanted.task
        return wanted.task, wanted.image, wanted.top_k, self.expires

    def _finish(self, job: "asyncio.Future[Reply]") -> None:
        self.server.state.release(self.task)
        job.exception()  # when nobody waits for the answer any more, nobody need hear of it

    def _loop_deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.expires - time.monotonic()


def _key_check(expected: str | None) -> Callable[..., None]:
    def check(key: str | None = Depends(_key_header)) -> None:
        if expected is not None and not hmac.compare_digest((key or "").encode(), expected.encode()):
            raise HTTPError(401, "give the server's key in the X-API-Key header", {"WWW-Authenticate": "APIKey"})

    return check


def _store(server: Server) -> "AdapterStore":
    if server.store is None:
        server.state.check_ready()
    assert server.store is not None
    return server.store
