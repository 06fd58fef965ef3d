"""The HTTP server: LitServe around one `Engine`.

One process supervises one spawned worker that holds the backbone, and is the desk: it counts admitted requests, what
tenants have used and all metrics, and knows which answers are pending and how the worker is. It also answers HTTP::

    client -> app.py: read, parse, check   -> desk.py: gate.py -> server.py -> link.py -> litserve.py: Scheduler.submit
    client <- app.py: JSON or problem+json <- desk.py: gate.py <- server.py <- link.py <- litserve.py: its future

With more than one HTTP process it leaves that to them, and they come to its desk over a link (front.py, fronts.py); all
limits hold for all of them together, because they are counted in one place.

The routes in app.py ask whoever keeps the promise of `gpt_serve.serve.messages.Asks`, so they can be mounted on
something else than this server, too.
"""

from gpt_serve.serve.config import ServeConfig

__all__ = ["ServeConfig", "run"]


def run(config: ServeConfig) -> int:
    """Serve until a signal; see `gpt_serve.serve.runner.run_server`."""
    from gpt_serve.serve.runner import run_server  # torch and LitServe: seconds to import

    return run_server(config)
