"""Keeps one worker alive: notices death and hanging, restarts, and gives up when that cannot help."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib import import_module
from multiprocessing.context import SpawnProcess

from gpt_serve.errors import GPTServeError, NotReady
from gpt_serve.serve.process import DEATH_WINDOW, MAX_DEATHS, readable
from gpt_serve.serve.server import Server

logger = logging.getLogger("gpt_serve.serve")

POLL = 0.05  # seconds between looks at a loading worker
RETRY = 1.0  # seconds between attempts to start one
TOO_SLOW = "the worker did not load the backbone within"
NOT_LOADED = "the worker died while loading the backbone: see the log above"


class Supervisor:
    """Runs workers one after another until told to stop.

    Args:
        server: whose state it keeps up to date.
        announce: called and awaited each time a worker becomes ready.
    """

    def __init__(self, server: Server, announce: Callable[[], Awaitable[None]]) -> None:
        self.server = server
        self.announce = announce
        self.worker: SpawnProcess | None = None

    async def run(self) -> None:
        """Returns only with ``state.fatal`` set."""
        state = self.server.state
        deaths: list[float] = []
        while state.fatal is None:
            try:
                self.worker = await self.server.start_worker()
            except OSError as error:  # too many files or processes just now
                logger.error("a worker cannot be started: %s; trying again", error.strerror)
                await asyncio.sleep(RETRY)
                continue
            # The worker needs seconds to load; meanwhile this process imports what it needs of torch.
            await asyncio.to_thread(import_module, "gpt_serve.adapters.store")
            died = readable(self.worker.sentinel)
            loaded = await self._until_ready(died)
            if loaded:
                self.server.enter("ready")
                await self.announce()
                await self._until_dead(died)
            asyncio.get_running_loop().remove_reader(self.worker.sentinel)
            self.server.enter("restarting")
            await self.server.drained()
            if loaded:
                deaths = [at for at in deaths if at > time.monotonic() - DEATH_WINDOW] + [time.monotonic()]
                state.fatal = self._verdict(len(deaths))
            else:
                state.fatal = self.server.worker_error or NotReady(NOT_LOADED)
            self.server.fail_pending("the worker died while the request was with it: try again in a few seconds")
            state.restarts += 1

    async def _until_ready(self, died: asyncio.Event) -> bool:
        """Whether the worker loaded its backbone before it died; one that takes too long is killed."""
        assert self.worker is not None
        patience = self.server.config.load_timeout
        began = time.monotonic()
        while not died.is_set():
            if self.server.worker_ready:
                return True
            if time.monotonic() - began > patience and self.server.worker_error is None:
                logger.error("the worker has not loaded the backbone within %.0f s: killing it", patience)
                self.server.worker_error = NotReady(f"{TOO_SLOW} {patience:.0f} s: look at what it loads from")
                self.worker.kill()
            await asyncio.sleep(POLL)
        return False

    async def _until_dead(self, died: asyncio.Event) -> None:
        """Wait for the end of the worker, and bring it about when it hangs."""
        assert self.worker is not None
        patience = 2 * self.server.config.deadline
        while not died.is_set():
            if self.server.stuck() > patience:
                logger.error("the worker has been stuck for %.0f s: killing it", patience)
                self.worker.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(died.wait(), min(1.0, patience / 4))

    def _verdict(self, deaths: int) -> GPTServeError | None:
        """What ends the server after a worker's death, if anything does."""
        assert self.worker is not None
        self.worker.join()
        logger.error("the worker died (exit code %s)", self.worker.exitcode)
        if deaths >= MAX_DEATHS:
            return NotReady(f"the worker died {deaths} times within {DEATH_WINDOW:.0f} s: the server gives up")
        return None
