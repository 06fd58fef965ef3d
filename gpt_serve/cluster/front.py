"""The HTTP side: the routes of ``gpt-serve serve``, in an actor of Ray Serve, asking replicas instead of a worker."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from gpt_serve.cluster.metrics import ClusterDesk
from gpt_serve.errors import DeadlineExceeded, NotReady
from gpt_serve.serve.app import Door, build_app
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.messages import Answer, Failure, Item
from gpt_serve.serve.metrics import RequestMetrics
from gpt_serve.serve.process import configure_logging
from gpt_serve.serve.state import ServerState

logger = logging.getLogger("gpt_serve.cluster")

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0  # seconds between two attempts, doubling


class Replicas:
    """Whoever answers items, see `gpt_serve.serve.messages.Asks`: the replicas behind a handle of Ray Serve.

    A replica that dies takes its requests with it, and Ray's router does not repeat them. A prediction changes nothing,
    so it is asked for again, until nobody waits for it any more.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._running: set[asyncio.Task[Answer]] = set()  # the loop itself holds tasks weakly

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        """Have ``item`` answered by a replica, and by another one if that dies."""
        task = asyncio.get_running_loop().create_task(self._answer(item))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _answer(self, item: Item) -> Answer:
        pause = FIRST_PAUSE
        while (left := item.expires - time.monotonic()) > 0:
            reply = await self._attempt(item, left)
            if isinstance(reply, Answer):
                return reply
            if not isinstance(reply.error(), NotReady):
                raise reply.error()
            await asyncio.sleep(min(pause, max(0.0, item.expires - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise DeadlineExceeded("no replica answered in time: try again later")

    async def _attempt(self, item: Item, left: float) -> Answer | Failure:
        """One replica's reply; a `NotReady` when it died or there is none."""
        try:
            async with asyncio.timeout(left):
                reply: Answer | Failure = await self.handle.answer.remote(item, left)
                return reply
        except RayTaskError:  # raised in the replica: a bug, and no matter of its death
            raise
        except (RayError, RayServeException) as error:
            logger.warning("a replica did not answer, another one is asked: %s", type(error).__name__)
            return Failure.of(NotReady("a replica died"))
        except TimeoutError:
            return Failure.of(NotReady("no replica answered in time"))


def build_front(config: ServeConfig, engine_name: str) -> FastAPI:
    """The application of one front: the routes, and whom they ask.

    Args:
        config: the limits, the deadline, the key and where the adapters are.
        engine_name: of the deployment of replicas in the same application of Ray Serve.
    """
    from ray import serve

    configure_logging()
    state = ServerState(config.queue_limit)
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(engine_name, app_name=context.app_name)
    desk = ClusterDesk(config, Replicas(handle), state, RequestMetrics(state))
    desk.handle = handle
    door = Door(config, desk)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.spec = await handle.spec.remote()
        await asyncio.to_thread(getattr, desk, "store")  # lists the adapters, perhaps beyond a network
        state.phase = "ready"
        yield
        door.close()

    return build_app(door, lifespan)
