"""The desk: everything that must be exact although several processes answer HTTP is counted here, in one of them.

::

    front.py: Door -> RemoteDesk  --link-->  fronts.py: Window -> Desk -> Gate -> Server -> worker
    runner.py: Door ------------------------------------------> Desk -> Gate -> Server -> worker      with one process

The routes know only `Desk`'s methods, and not in which process it is.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.gate import Gate
from gpt_serve.serve.keyfile import Tenant
from gpt_serve.serve.messages import Answer, Asks, Item
from gpt_serve.serve.metrics import RequestMetrics
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.tenants import Allowances

if TYPE_CHECKING:
    from gpt_serve.adapters.store import AdapterStore

_SCRAPE_SHARE = 0.2  # of one core, for /metrics


class Desk(Protocol):
    """What the routes ask for. All is called in the event loop; what does not return a future does not wait.

    Attributes:
        state: whether requests are taken on.
    """

    state: ServerState

    def ask(self, item: Item) -> "asyncio.Future[Answer]":
        """See `gpt_serve.serve.gate.Gate.ask`."""
        ...

    async def count_request(self, tenant: Tenant) -> None:
        """See `gpt_serve.serve.tenants.Allowances.count_request`."""
        ...

    async def take(self, tenant: Tenant, count: int) -> None:
        """See `gpt_serve.serve.tenants.Allowances.take`."""
        ...

    def give(self, tenant: Tenant, count: int) -> None:
        """See `gpt_serve.serve.tenants.Allowances.give`."""
        ...

    def answered(
        self, route: str, tenant: str, status: int, answers: Iterable[tuple[str, int]], seconds: float
    ) -> None:
        """See `gpt_serve.serve.metrics.Metrics.answered`."""
        ...

    def refused(self, status: int) -> None:
        """See `gpt_serve.serve.metrics.Metrics.refused`."""
        ...

    async def exposition(self) -> bytes:
        """What ``GET /metrics`` answers."""
        ...

    async def tasks(self) -> list[str]:
        """The names of the stored tasks, sorted."""
        ...

    async def listing(self, tenant: Tenant) -> bytes:
        """What ``GET /tasks`` answers ``tenant``."""
        ...

    async def summary(self, task: str) -> dict[str, Any]:
        """What ``GET /tasks/{task}`` answers."""
        ...


class LocalDesk:
    """The desk itself.

    Args:
        config: the limits, and where the adapters are.
        asks: who answers items.
        state: whether requests are taken on, and how many there are.
        metrics: where all is counted.
    """

    def __init__(self, config: ServeConfig, asks: Asks, state: ServerState, metrics: RequestMetrics) -> None:
        self.config = config
        self.state = state
        self.metrics = metrics
        self.answered, self.refused = metrics.answered, metrics.refused
        self.ask = Gate(asks, state).ask
        self.allowances = Allowances()
        self._reading = ThreadPoolExecutor(4, thread_name_prefix="read")  # for the disk, which may never answer
        self._store: AdapterStore | None = None
        self._making_store = Lock()
        self._scraping = asyncio.Lock()
        self._next_scrape: asyncio.Task[bytes] | None = None
        self._no_scrape_before = 0.0

    async def count_request(self, tenant: Tenant) -> None:
        """Count a request of ``tenant``."""
        self.allowances.count_request(tenant)

    async def take(self, tenant: Tenant, count: int) -> None:
        """Count ``count`` answers of ``tenant`` until `give`."""
        self.allowances.take(tenant, count)

    def give(self, tenant: Tenant, count: int) -> None:
        """They are no longer on their way."""
        self.allowances.give(tenant, count)

    @property
    def store(self) -> "AdapterStore":
        """The adapters, checked against the backbone; to be called in a thread, as it may look beyond a network.

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

    async def tasks(self) -> list[str]:
        """The names of the stored tasks, sorted."""
        return list(await self.read(lambda: self.store.tasks()))

    async def listing(self, tenant: Tenant) -> bytes:
        """The tasks that the key of ``tenant`` opens, as JSON; one that cannot be served is there with the reason."""
        return bytes(await self.read(self._listing, tenant))

    async def summary(self, task: str) -> dict[str, Any]:
        """One adapter, with its labels. Raises `UnknownTask`."""
        found = await self.read(lambda: self.store.summary(task))
        return {**found.to_dict(), "labels": list(found.labels)}

    async def exposition(self) -> bytes:
        """The metrics, in Prometheus's format, with all that was counted before this call.

        Those who ask meanwhile share the next text, and making it takes no more than a fifth of a core: with thousands
        of tasks it is large, and anybody may ask for it again and again.
        """
        if self._next_scrape is None:
            self._next_scrape = asyncio.create_task(self._scrape())
        return await asyncio.shield(self._next_scrape)

    async def _scrape(self) -> bytes:
        async with self._scraping:
            await asyncio.sleep(max(0.0, self._no_scrape_before - time.monotonic()))
            self._next_scrape = None  # what is counted from now on is in a later one
            began = time.monotonic()
            text = await self.scrape()
            ended = time.monotonic()
            self._no_scrape_before = ended + (ended - began) * (1 / _SCRAPE_SHARE - 1)
            return text

    async def scrape(self) -> bytes:
        """The metrics as they are now."""
        return bytes(await self.read(self.metrics.text))

    def _listing(self, tenant: Tenant) -> bytes:
        entries = [entry.to_dict() for entry in self.store.describe() if tenant.may_ask(entry.task)]
        return json.dumps({"tasks": entries}, ensure_ascii=False).encode()

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function`` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, function, *arguments)
