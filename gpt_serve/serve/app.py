"""The routes. They know whom to ask, the store and a state, and not who runs the engine: see `Door`."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from threading import Lock
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from gpt_serve import __version__
from gpt_serve.errors import TaskForbidden
from gpt_serve.serve import problems, schema
from gpt_serve.serve.access import KEY, AccessLog
from gpt_serve.serve.bodies import Bodies
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.keyfile import Tenant
from gpt_serve.serve.messages import Asks
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.observed import Observed
from gpt_serve.serve.pages import add_pages
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.tenants import Doorkeeper
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
        keeper: who may ask.
        log: the access log, if there is one.
        bodies: the request bodies that are being read.
        parsing: a thread for bodies that are too large to be parsed in the event loop.
        reading: threads for what touches the disk, which may never answer.
    """

    def __init__(self, config: ServeConfig, asks: Asks, state: ServerState, metrics: Metrics) -> None:
        self.config = config
        self.asks = asks
        self.state = state
        self.metrics = metrics
        self.keeper = Doorkeeper(config.keys, config.api_key)
        self.log = None if config.access_log is None else AccessLog(config.access_log)
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

    def close(self) -> None:
        """Stop watching the keys, and finish the access log."""
        self.keeper.close()
        if self.log is not None:
            self.log.close()

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that touches the disk."""
        return await asyncio.get_running_loop().run_in_executor(self.reading, function, *arguments)

    def tenant(self, request: Request) -> Tenant:
        """Who asks. Raises `InvalidKey` where a key is needed and none, or an unknown one, is given."""
        headers = request.headers
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        tenant = self.keeper.tenant(given)
        request.scope[KEY].tenant = "" if self.keeper.is_open else tenant.name
        return tenant


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
    app.add_middleware(Observed, metrics=door.metrics, log=door.log)
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
        """Classify an image with the adapter of a task.

        `task` and `top_k` may be query parameters instead of fields. Several images get a list with an answer or a
        problem for each. So do several tasks, as `task` repeated or a list, or all that the key opens with `tasks=*`;
        what tasks of an image share is computed once. Several tasks of several images get a list for each image.
        """
        return await Call(door, request).response()

    async def predict_task(request: Request) -> Response:
        """Classify the image that is the body, with the adapter of the task in the path."""
        return await Call(door, request).response()

    route: dict[str, Any] = {"methods": ["POST"], "route_class_override": Direct, "dependencies": _documented(door)}
    app.router.add_api_route("/predict", predict, **route, **schema.PREDICT)
    app.router.add_api_route("/predict/{task}", predict_task, **route, **schema.PREDICT_TASK)


def _add_tasks(app: FastAPI, door: Door) -> None:
    guarded = _documented(door)

    @app.get("/tasks", dependencies=guarded, **schema.TASKS)
    async def tasks(request: Request) -> Response:
        """List the adapters that the key opens; one that cannot be served is listed with the reason."""
        text = await door.read(_listing, door, door.tenant(request))
        return Response(text, media_type="application/json")

    @app.get("/tasks/{task}", dependencies=guarded, **schema.TASK)
    async def task(request: Request) -> Response:
        """Describe one adapter, with its labels."""
        task = request.path_params["task"]
        door.keeper.check_task(door.tenant(request), check_task_name(task))
        summary = await door.read(lambda: door.store.summary(task))
        return JSONResponse(summary.to_dict() | {"labels": list(summary.labels)})


def _listing(door: Door, tenant: Tenant) -> bytes:
    entries = [entry.to_dict() for entry in door.store.describe() if tenant.may_ask(entry.task)]
    return json.dumps({"tasks": entries}, ensure_ascii=False).encode()


def _documented(door: Door) -> list[Any]:
    """Says in the interface's description that a key is needed, if it is; `Door.tenant` looks at the header."""
    return [] if door.keeper.is_open else [Depends(APIKeyHeader(name="X-API-Key", auto_error=False))]


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

    @app.get("/metrics", dependencies=_documented(door), **schema.METRICS)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics. They name all tasks and tenants, so they need a key that opens all tasks."""
        if "*" not in door.tenant(request).tasks:
            raise TaskForbidden("the metrics name all tasks: they need a key that opens all of them")
        text = await door.read(door.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)
