"""Which replica answers, see `gpt_serve.serve.routing`."""

from typing import Any

from ray.serve.request_router import RequestRouter

from gpt_serve.serve.messages import Item
from gpt_serve.serve.routing import order


class TaskRouter(RequestRouter):  # type: ignore[misc]
    """Ray Serve's router of an application's handles, see `ray.serve.request_router.RequestRouter`."""

    def initialize_state(self, busy: int) -> None:
        """Take the options.

        Args:
            busy: a replica with so many requests is passed over while others have fewer.
        """
        self.busy = busy

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> list[list[Any]]:
        """The replicas in the order in which Ray is to try them: one that is full passes the request on."""
        items = [] if pending_request is None else pending_request.args
        task = next((item.task for item in items if isinstance(item, Item)), "")
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        waiting = {name: self._waiting(replica) for name, replica in replicas.items()}
        return [[replicas[name]] for name in order(task, waiting, self.busy)]

    def _waiting(self, replica: Any) -> int:
        """Requests that the replica had when this process last heard of it, plus those sent since."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
