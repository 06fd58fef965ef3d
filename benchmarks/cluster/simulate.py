"""100 replicas and 100,000 adapters under Zipf traffic: hit rates and the load on the store, by routing.

Each replica has room for some adapters (the least recently used leaves). A request for one that is not there is a fetch
from the host's memory or disk the next time, and a fetch from the store the first time on that machine: a machine keeps
up to ``--disk`` adapters. Routings:

random      any replica
two         the less busy of two random ones (Ray Serve's default)
task        `gpt_serve.cluster.routing.order`: the task's own, passed over while it has a batch waiting

Requests arrive one by one, and every replica answers one in the time in which ``--load`` times their number arrive.
Run: ``python benchmarks/cluster/simulate.py``.
"""

import argparse
import json
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from functools import cache
from itertools import accumulate

from gpt_serve.cluster.routing import order

BATCH = 32


class Replica:
    """Its bank, its machine's disk, and the requests that it has."""

    def __init__(self, bank: int, disk: int) -> None:
        self.bank, self.disk = Cache(bank), Cache(disk)
        self.queue: deque[int] = deque()
        self.answered = 0


class Cache:
    """The least recently used leaves."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: OrderedDict[int, None] = OrderedDict()

    def take(self, task: int) -> bool:
        """Whether ``task`` was there; it is now."""
        there = task in self.held
        self.held[task] = None
        self.held.move_to_end(task)
        if len(self.held) > self.size:
            self.held.popitem(last=False)
        return there


def random_choice(task: int, replicas: list[Replica]) -> int:
    return random.randrange(len(replicas))


def two_choices(task: int, replicas: list[Replica]) -> int:
    return min(random.sample(range(len(replicas)), 2), key=lambda index: len(replicas[index].queue))


def own_choice(task: int, replicas: list[Replica]) -> int:
    ranked = ranking(task, len(replicas))
    free = next((index for index in ranked if len(replicas[index].queue) < BATCH), None)
    return min(ranked, key=lambda index: len(replicas[index].queue)) if free is None else free


@cache
def ranking(task: int, count: int) -> tuple[int, ...]:
    """The replicas by rendezvous hashing, as the router ranks idle ones."""
    return tuple(int(name) for name in order(f"task-{task}", {str(index): 0 for index in range(count)}, BATCH))


def simulate(choose: Callable[[int, list[Replica]], int], options: argparse.Namespace) -> dict[str, float]:
    """Rates over the second half of the requests."""
    random.seed(options.seed)
    weights = list(accumulate(1 / rank**options.zipf for rank in range(1, options.adapters + 1)))
    replicas = [Replica(options.bank, options.disk) for _ in range(options.replicas)]
    counts: Counter[str] = Counter()
    longest = 0
    credit = 0.0
    tasks = random.choices(range(options.adapters), cum_weights=weights, k=options.requests)
    for number, task in enumerate(tasks):
        replica = replicas[choose(task, replicas)]
        replica.queue.append(task)
        hit = replica.bank.take(task)
        near = hit or replica.disk.take(task)
        replica.answered += 1
        credit += 1 / options.load
        while credit >= options.replicas:  # in which each replica could answer one
            credit -= options.replicas
            for other in replicas:
                if other.queue:
                    other.queue.popleft()
        if number >= options.requests // 2:
            counts["requests"] += 1
            counts["bank"] += hit
            counts["store"] += not near
            longest = max(longest, len(replica.queue))
    share = [replica.answered for replica in replicas]
    return {
        "bank hits": counts["bank"] / counts["requests"],
        "store fetches a thousand requests": 1000 * counts["store"] / counts["requests"],
        "longest queue": longest,
        "busiest replica by the mean": max(share) * len(share) / sum(share),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--bank", type=int, default=2000, help="Adapters on a replica's device.")
    parser.add_argument("--disk", type=int, default=20_000, help="Adapters in a machine's cache.")
    parser.add_argument("--requests", type=int, default=2_000_000)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--load", type=float, default=0.7, help="Of what all replicas can answer.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--poll-seconds", type=float, default=30.0)
    options = parser.parse_args()
    for name, choose in (("random", random_choice), ("two", two_choices), ("task", own_choice)):
        rates = simulate(choose, options)
        print(json.dumps({"routing": name} | {key: round(value, 4) for key, value in rates.items()}), flush=True)
    pages = -(-2 * options.adapters // 1000)  # an adapter and its digest, a thousand names a call
    calls = pages * options.replicas / options.poll_seconds
    print(json.dumps({"listing": {"calls a listing": pages, "calls a second of all machines": round(calls, 1)}}))


if __name__ == "__main__":
    main()
