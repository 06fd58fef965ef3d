"""LitServe's parts, put together so that a dead or hung process is always noticed.

`LitServer.run` is not used: it answers nothing while the model loads, never looks at a killed API process, and on
SIGTERM leaves its children alive. What is used: the worker process with its loop, the queues, the response buffer.
"""

import asyncio
import pickle
import time
import uuid
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from multiprocessing.managers import SyncManager
from typing import TYPE_CHECKING, Any

from litserve import LitServer
from litserve.server import response_queue_to_buffer
from litserve.transport.process_transport import MPQueueTransport
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus

from gpt_serve.errors import GPTServeError, NotReady
from gpt_serve.serve.config import ServeConfig
from gpt_serve.serve.metrics import Metrics
from gpt_serve.serve.problems import by_name
from gpt_serve.serve.process import guard_manager
from gpt_serve.serve.state import ServerState
from gpt_serve.serve.worker import Item, PredictAPI, Reply
from gpt_serve.specs import BackboneSpec

if TYPE_CHECKING:
    from gpt_serve.store import AdapterStore

CONSUMER = 0  # LitServe numbers its API processes; here it is the only one


class Server(LitServer):
    """One worker and the pending answers.

    Attributes:
        config: the options.
        state: phase, admitted requests, draining.
        metrics: what ``/metrics`` shows.
        store: the adapters, checked against the backbone; None until a worker has loaded it.
        spec: the backbone's, from the worker.
    """

    def __init__(self, config: ServeConfig, api: PredictAPI) -> None:
        kind, _, index = config.device.partition(":")
        devices: Any = 1 if kind == "cpu" else [int(index or 0)]
        # timeout=False: the deadline travels with each request, see worker.py.
        super().__init__(api, accelerator=kind, devices=devices, timeout=False)  # type: ignore[arg-type]
        self.config = config
        self.api = api
        self.state = ServerState(config.queue_limit)
        self.metrics = Metrics(self.state)
        self.store: AdapterStore | None = None
        self.spec: BackboneSpec | None = None
        self.pending: dict[str, float] = {}  # uid -> time.monotonic() of its submission
        self.manager = self._init_manager(1)

    def _init_manager(self, num_api_servers: int) -> SyncManager:
        """LitServe's manager process, but spawned, so that it inherits no socket, and guarded."""
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(guard_manager)
        self.workers_setup_status = manager.dict()
        self.api.board = manager.dict()
        self._transport = MPQueueTransport(manager, [manager.Queue() for _ in range(num_api_servers)])  # type: ignore[misc]
        return manager

    @property
    def manager_sentinel(self) -> int:
        """Becomes readable when the manager process ends."""
        return int(self.manager._process.sentinel)  # type: ignore[attr-defined]

    def start_worker(self) -> SpawnProcess:
        """Spawn a worker with a queue of its own: what a dead one left behind has already been answered."""
        self.litapi_request_queues[self.api.api_path] = self.manager.Queue()
        self.api.board.clear()
        worker: SpawnProcess = self.launch_single_inference_worker(self.api, 0)
        return worker

    def worker_is_ready(self) -> bool:
        """Whether LitServe saw the worker's ``setup`` return; takes over the backbone's spec."""
        if WorkerSetupStatus.READY not in self.workers_setup_status.values():
            return False
        if self.spec is None:
            from gpt_serve.store import AdapterStore  # loaded by now, see Supervisor.run

            self.spec = pickle.loads(self.api.board["spec"])
            self.store = AdapterStore(self.config.adapters, self.spec)
        return True

    def worker_error(self) -> GPTServeError | None:
        """Why the worker could not load, if it said so."""
        error = self.api.board.get("error")
        return by_name(*error) if error else None

    async def ask(self, item: Item) -> Reply:
        """Have the worker answer ``item``. Returns late rather than never: see `fail_pending`.

        Raises:
            NotReady: the worker died first.
            GPTServeError: the worker's loop failed.
        """
        uid = uuid.uuid4().hex
        answer = ResponseBufferItem(asyncio.Event())
        self.response_buffer[uid] = answer
        self.pending[uid] = time.monotonic()
        try:
            queue = self._get_request_queue(self.api.api_path)
            # In a thread: the manager takes megabytes through a socket.
            await asyncio.to_thread(queue.put, (CONSUMER, uid, self.pending[uid], item))
            await answer.event.wait()
        finally:
            del self.response_buffer[uid], self.pending[uid]
        value, status = answer.response  # type: ignore[misc]
        if isinstance(value, GPTServeError):
            raise value
        if status != LitAPIStatus.OK:
            raise GPTServeError("the worker's loop failed")
        reply: Reply = value
        return reply

    def fail_pending(self, reason: str) -> None:
        """Answer every pending request with `NotReady`."""
        for answer in self.response_buffer.values():
            answer.response = (NotReady(reason), LitAPIStatus.ERROR)
            answer.event.set()

    def oldest_pending(self) -> float:
        """Seconds that the longest pending request has been with the worker; 0 when there is none."""
        return time.monotonic() - min(self.pending.values()) if self.pending else 0.0

    async def receive_answers(self) -> None:
        """Move answers from the worker's queue to the response buffer, for ever."""
        await response_queue_to_buffer(self._transport, self.response_buffer, CONSUMER, self.litapi_connector)

    def stop_receiving(self) -> None:
        """Wake the thread that waits for answers."""
        self._transport.close(send_sentinel=True)

    def close(self, worker: Any) -> None:
        """End the children. Nothing of theirs needs saving, so the worker is killed rather than asked."""
        if worker is not None:
            worker.kill()
            worker.join()
        self.manager.shutdown()
