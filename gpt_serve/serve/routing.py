"""Which worker answers: for a task always the same one, as long as it keeps up, so that each bank holds its share.

Rendezvous hashing with bounded loads: a task ranks the workers by a hash of both names. The first that has less than a
batch waiting gets the request. A hot task thus spreads over as many workers as it needs, and a cold one is fetched and
loaded by one of them, not by all. When a worker comes or goes, only the tasks move that it gets or had. No worker has
to report what it holds, so the choice is right at once, and the same in every process that routes.
"""

import hashlib


def order(task: str, waiting: dict[str, int], busy: int) -> list[str]:
    """Names of the workers, the best for ``task`` first.

    Args:
        waiting: requests that each has.
        busy: those with so many come last, the least busy of them first.
    """
    ranked = sorted(waiting, key=lambda name: weight(task, name), reverse=True)
    return sorted(ranked, key=lambda name: max(0, waiting[name] - busy + 1))


def weight(task: str, worker: str) -> bytes:
    """A number for each pair, evenly spread."""
    return hashlib.blake2b(f"{task}\0{worker}".encode(), digest_size=8).digest()
