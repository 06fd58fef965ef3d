"""uvicorn as this project uses it."""

from collections.abc import Callable
from functools import partial

import uvicorn
from fastapi import FastAPI

from gpt_serve.serve.app import Door
from gpt_serve.serve.connections import BACKLOG, KEEP_ALIVE_SECONDS, Connection, Connections, connections_possible

LAST_BYTES = 5  # seconds for clients to take their last answers


class HTTPServer(uvicorn.Server):
    """Answers HTTP with limits on its connections, until told to stop.

    Args:
        door: says how many connections there may be, and counts what is refused.
        app: what answers.
        stopping: asked ten times a second whether to end. What is being answered then is finished.
        every_second: called about once a second.
    """

    def __init__(
        self,
        door: Door,
        app: FastAPI,
        *,
        stopping: Callable[[], bool],
        every_second: Callable[[], None] = lambda: None,
    ) -> None:
        state = door.desk.state
        self.connections = Connections(
            connections_possible(door.config.max_connections),
            draining=lambda: state.draining,
            refused=door.desk.refused,
        )
        self.stopping = stopping
        self.every_second = every_second
        # No websockets: nothing here speaks them.
        config = uvicorn.Config(
            app,
            http=partial(Connection, connections=self.connections),  # type: ignore[arg-type]
            loop="uvloop",
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(door.config.trusted_proxies),
            forwarded_allow_ips=door.config.trusted_proxies,
            timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
            timeout_graceful_shutdown=LAST_BYTES,
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if counter % 10 == 0:
            self.connections.sweep()
            self.every_second()
        self.should_exit = self.should_exit or self.stopping()
        return await super().on_tick(counter)
