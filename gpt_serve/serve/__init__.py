"""The HTTP server: LitServe around one `Engine`.

One process answers HTTP and supervises one spawned worker that holds the backbone::

    client -> app.py: admit, read, parse, check -> server.py -> link.py -> litserve.py: Scheduler.submit
    client <- app.py: JSON or problem+json      <- server.py <- link.py <- litserve.py: its future

The routes in app.py ask whoever keeps the promise of `gpt_serve.serve.messages.Asks`, so they can be mounted on
something else than this server, too.

One API process is enough (it only moves bytes) and keeps everything that must be exact in one place: the count of
admitted requests, the pending answers, the liveness of the worker and the metrics.
"""

from gpt_serve.serve.config import ServeConfig

__all__ = ["ServeConfig", "run"]


def run(config: ServeConfig) -> int:
    """Serve until a signal; see `gpt_serve.serve.runner.run_server`."""
    from gpt_serve.serve.runner import run_server  # torch and LitServe: seconds to import

    return run_server(config)
