"""The routes. They know the desk, and not in which process it is or who runs the engine: see `Door`."""

from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any

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
from gpt_serve.serve.desk import Desk
from gpt_serve.serve.keyfile import Tenant
from gpt_serve.serve.observed import Observed
from gpt_serve.serve.pages import add_pages
from gpt_serve.serve.tenants import Doorkeeper
from gpt_serve.serve.tracing import telemetry
from gpt_serve.specs import check_task_name

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Door:
    """What the routes need of the rest.

    Attributes:
        config: the limits, the deadline and the key.
        desk: who answers, and counts.
        keeper: who may ask.
        log: the access log, if there is one.
        bodies: the request bodies that are being read.
        parsing: a thread for bodies that are too large to be parsed in the event loop.
    """

    def __init__(self, config: ServeConfig, desk: Desk) -> None:
        self.config = config
        self.desk = desk
        self.keeper = Doorkeeper(config.keys, config.api_key)
        self.log = None if config.access_log is None else AccessLog(config.access_log)
        self.bodies = Bodies(config.max_body_bytes, config.deadline)
        self.parsing = ThreadPoolExecutor(1, thread_name_prefix="parse")

    def close(self) -> None:
        """Stop watching the keys, and finish the access log."""
        self.keeper.close()
        if self.log is not None:
            self.log.close()

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
    app.add_middleware(Observed, desk=door.desk, log=door.log)
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
        """Ask a task about an image: labels with probabilities, or a mask where the task segments.

        `task`, `top_k` and `mask` may be query parameters instead of fields. Several images get a list with an answer
        or a problem for each. So do several tasks, as `task` repeated or a list, or all that the key opens with
        `tasks=*`; what tasks of an image share is computed once. Several tasks of several images get a list for each
        image.
        """
        return await Call(door, request).response()

    async def predict_task(request: Request) -> Response:
        """Ask the task in the path about the image that is the body."""
        return await Call(door, request).response()

    async def attention(request: Request) -> Response:
        """Show where the adapter of the task in the path looks in the image that is the body.

        The picture is a PNG in base64: the image as the backbone saw it, and over it how much of the last block's
        attention each patch gets. `most` says what the brightest gets, as a multiple of an even share.
        """
        return await Call(door, request, attention=True).response()

    route: dict[str, Any] = {"methods": ["POST"], "route_class_override": Direct, "dependencies": _documented(door)}
    app.router.add_api_route("/predict", predict, **route, **schema.PREDICT)
    app.router.add_api_route("/predict/{task}", predict_task, **route, **schema.PREDICT_TASK)
    app.router.add_api_route("/attention/{task}", attention, **route, **schema.ATTENTION)


def _add_tasks(app: FastAPI, door: Door) -> None:
    guarded = _documented(door)

    @app.get("/tasks", dependencies=guarded, **schema.TASKS)
    async def tasks(request: Request) -> Response:
        """List the adapters that the key opens; one that cannot be served is listed with the reason."""
        text = await door.desk.listing(door.tenant(request))
        return Response(text, media_type="application/json")

    @app.get("/tasks/{task}", dependencies=guarded, **schema.TASK)
    async def task(request: Request) -> Response:
        """Describe one adapter, with its labels."""
        task = request.path_params["task"]
        door.keeper.check_task(door.tenant(request), check_task_name(task))
        return JSONResponse(await door.desk.summary(task))


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
        door.desk.state.check_ready()
        spec = door.desk.state.spec
        assert spec is not None
        return JSONResponse({"status": "ready", "backbone": spec.name, "backbone_sha256": spec.fingerprint})

    @app.get("/metrics", dependencies=_documented(door), **schema.METRICS)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics. They name all tasks and tenants, so they need a key that opens all tasks."""
        if "*" not in door.tenant(request).tasks:
            raise TaskForbidden("the metrics name all tasks: they need a key that opens all of them")
        text = await door.desk.exposition()
        return Response(text, media_type=CONTENT_TYPE_LATEST)
