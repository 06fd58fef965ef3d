"""Run attacks one after another, and print what an honest client has before and during each."""

import json
import multiprocessing
import sys
import threading
import time

import click

from benchmarks.attacks.attacks import ATTACKS, ask_each
from benchmarks.attacks.honest import Client, attacked, port_of, serving
from gpt_serve.bench.setting import photo

MANY, SERIES = 10_000, 1000  # tasks, and how many of them have series of their own in the metrics
Process = "subprocess.Popen[bytes]"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ATTACKS)))
@click.option("--seconds", type=click.FloatRange(1, 60), default=6.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", type=click.IntRange(1, 10), default=2, show_default=True, help="Before and during, in turns.")
@click.option("--http-workers", type=click.IntRange(1, 8), default=1, show_default=True, help="Of the server.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def main(names: tuple[str, ...], seconds: float, rounds: int, http_workers: int, as_json: bool) -> None:
    """Attack a server of its own, NAMES or all."""
    options = ["--http-workers", str(http_workers)]
    with serving(*options, many=MANY if "metrics" in (names or ATTACKS) else 0) as server:
        client = Client(port_of(server), "honest", photo(0))
        client.run(3)  # warm
        for name in names or ATTACKS:
            if name == "metrics":
                ask_each(port_of(server), SERIES)
            row = measure(server, name, seconds, rounds)
            print(json.dumps(row) if as_json else line(row), flush=True)
            if server.poll() is not None:
                sys.exit("the server is gone")


def measure(server: Process, name: str, seconds: float, rounds: int) -> dict[str, object]:
    """Milliseconds of the honest client alone and under the attack."""
    attack, threads = ATTACKS[name]
    alone, during = (Client(port_of(server), "honest", photo(0)) for _ in range(2))
    for _ in range(rounds):
        alone.run(seconds)
        stop = multiprocessing.Event()
        attacker = multiprocessing.Process(target=_attacker, args=(port_of(server), name, threads, stop), daemon=True)
        attacker.start()
        time.sleep(1)
        during.run(seconds)
        stop.set()
        attacker.join(90)
        attacker.kill()
    return {
        "attack": name,
        "before p50": alone.quantile(0.5),
        "before p95": alone.quantile(0.95),
        "during p50": during.quantile(0.5),
        "during p95": during.quantile(0.95),
        "ratio p95": during.quantile(0.95) / alone.quantile(0.95),
        "requests": len(during.seconds),
        "failed": len(during.failures),
        "failures": sorted(set(during.failures)),
    }


def line(row: dict[str, object]) -> str:
    """For people."""
    times = ", ".join(f"{key} {row[key]:.0f} ms" for key in row if key.startswith(("before", "during")))
    return f"{row['attack']}: {times}, ratio {row['ratio p95']:.1f}, failed {row['failed']} of {row['requests']}"


def _attacker(port: int, name: str, threads: int, stop: "threading.Event") -> None:
    """In a process of its own, so that it does not slow the honest client's down."""
    ended = attacked(port, ATTACKS[name][0], threads)
    stop.wait(120)
    ended.set()


if __name__ == "__main__":
    main()
