"""The routes. They know whom to ask, the store and a state, and not who runs the engine: see `Door`."""

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from threading import Lock
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_serve import __version__
from gpt_serve.serve import problems, schema
from gpt_serve.serve.bodies import Bodies
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.messages import Asks
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.pages import add_pages
from gpt_serve.serve.problems import HTTPError
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.tracing import telemetry
from gpt_serve.specs import check_task_name

if TYPE_CHECKING:
    from gpt_serve.adapters.store import AdapterStore

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Door:
    """What the routes need of the rest.

    Attributes:
        config: the limits, the deadline and the key.
        asks: who answers items.
        state: whether requests are taken on, and how many there are.
        metrics: what ``/metrics`` shows.
        bodies: the request bodies that are being read.
        parsing: a thread for bodies that are too large to be parsed in the event loop.
        reading: threads for what touches the disk, which may never answer.
    """

    def __init__(self, config: ServeConfig, asks: Asks, state: ServerState, metrics: Metrics) -> None:
        self.config = config
        self.asks = asks
        self.state = state
        self.metrics = metrics
        self.bodies = Bodies(config.max_body_bytes, config.deadline)
        self.parsing = ThreadPoolExecutor(1, thread_name_prefix="parse")
        self.reading = ThreadPoolExecutor(4, thread_name_prefix="read")
        self._store: AdapterStore | None = None
        self._making_store = Lock()

    @property
    def store(self) -> "AdapterStore":
        """The adapters, checked against the backbone; to be called in `read`, as it may look beyond a network.

        Raises:
            NotReady: no worker has loaded the backbone yet.
        """
        with self._making_store:
            if self._store is None:
                if self.state.spec is None:
                    self.state.check_ready()
                from gpt_serve.adapters.store import AdapterStore  # torch: imported while the worker loads

                config = self.config
                self._store = AdapterStore(config.adapters, self.state.spec, poll_seconds=config.poll_seconds)
            return self._store

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that touches the disk."""
        return await asyncio.get_running_loop().run_in_executor(self.reading, function, *arguments)

    def check_key(self, request: Request) -> None:
        """Raise `HTTPError` 401 unless ``request`` has the server's key, if there is one."""
        expected, headers = self.config.api_key, request.headers
        if expected is None:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise HTTPError(401, "give the server's key in the X-API-Key header", {"WWW-Authenticate": "APIKey"})


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
    app.add_middleware(Observed, metrics=door.metrics)
    problems.install(app)
    add_pages(app)
    _add_probes(app, door)
    _add_predictions(app, door)
    _add_tasks(app, door)
    return app


class Direct(APIRoute):
    """A route whose function gets the request as it is: what FastAPI does around one costs more than the rest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself."""
        return self.endpoint


def _add_predictions(app: FastAPI, door: Door) -> None:
    from gpt_serve.serve.call import Call

    async def predict(request: Request) -> Response:
        """Classify one image, or several, with the adapter of one task."""
        return await Call(door, request).response()

    async def predict_task(request: Request) -> Response:
        """Classify the image that is the body, with the adapter of the task in the path."""
        return await Call(door, request).response()

    route: dict[str, Any] = {"methods": ["POST"], "route_class_override": Direct}
    app.router.add_api_route("/predict", predict, **route, **schema.PREDICT)
    app.router.add_api_route("/predict/{task}", predict_task, **route, **schema.PREDICT_TASK)


def _add_tasks(app: FastAPI, door: Door) -> None:
    guarded = [Depends(door.check_key)]

    @app.get("/tasks", dependencies=guarded, **schema.TASKS)
    async def tasks() -> Response:
        """List the stored adapters; one that cannot be served is listed with the reason."""
        text = await door.read(_listing, door)
        return Response(text, media_type="application/json")

    @app.get("/tasks/{task}", dependencies=guarded, **schema.TASK)
    async def task(task: str) -> Response:
        """Describe one adapter, with its labels."""
        name = check_task_name(task)
        summary = await door.read(lambda: door.store.summary(name))
        return JSONResponse(summary.to_dict() | {"labels": list(summary.labels)})


def _listing(door: Door) -> bytes:
    return json.dumps({"tasks": [entry.to_dict() for entry in door.store.describe()]}, ensure_ascii=False).encode()


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

    @app.get("/metrics", dependencies=[Depends(door.check_key)], **schema.METRICS)
    async def metrics() -> Response:
        """Prometheus metrics. They name tasks, so they need the key where there is one."""
        text = await door.read(door.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


class Observed:
    """Counts every answer, whoever gave it, and answers HEAD wherever GET is answered.

    A route may leave the name of a stored task in the scope's ``gpt_serve.task``.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500
        inner = scope if scope["method"] != "HEAD" else {**scope, "method": "GET"}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(inner, receive, sending)
        finally:
            route = getattr(inner.get("route"), "path", "")
            self.metrics.answered(route, inner.get("gpt_serve.task", ""), status, time.monotonic() - began)
