"""Which replica answers: for a task always the same one, as long as it keeps up, so that each bank holds its share.

Rendezvous hashing with bounded loads: a task ranks the replicas by a hash of both names. The first that has less than a
batch waiting gets the request. A hot task thus spreads over as many replicas as it needs, and a cold one is fetched and
loaded by one of them, not by all. When a replica comes or goes, only the tasks move that it gets or had. No replica has
to report what it holds, so the choice is right at once, and the same in every process that routes.
"""

import hashlib
from typing import Any

from ray.serve.request_router import RequestRouter

from gpt_serve.serve.messages import Item


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


def order(task: str, waiting: dict[str, int], busy: int) -> list[str]:
    """Names of the replicas, the best for ``task`` first.

    Args:
        waiting: requests that each has.
        busy: those with so many come last, the least busy of them first.
    """
    ranked = sorted(waiting, key=lambda name: weight(task, name), reverse=True)
    return sorted(ranked, key=lambda name: max(0, waiting[name] - busy + 1))


def weight(task: str, replica: str) -> bytes:
    """A number for each pair, evenly spread."""
    return hashlib.blake2b(f"{task}\0{replica}".encode(), digest_size=8).digest()
