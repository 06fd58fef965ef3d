"""Requests in, predictions out: loading, decoding and computing side by side, in batches that are fair between tasks.

::

    submit -> admission.py: pinned -> pipeline.py: decode -> batch -> Engine.compute -> future
                 |            ^
                 +--> load ---+   a request waits for its own adapter only

A request is pinned to one revision in one slot of the bank from the moment that its adapter is there until its batch is
done. Pinned requests never wait for anything that needs a pin (decoding and computing take none), so they always come
to an end, and what waits for room in the bank gets some: more tasks than fit cannot deadlock.
"""

from gpt_serve.engine.scheduler.jobs import Batch
from gpt_serve.engine.scheduler.pipeline import Scheduler

__all__ = ["Batch", "Scheduler"]
