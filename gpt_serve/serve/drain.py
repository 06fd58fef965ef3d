"""From a signal to the end: nothing new is admitted, what is admitted is finished."""

import logging
import signal
import time

from gpt_serve.serve.workers import Workers

logger = logging.getLogger("gpt_serve.serve")


class Drain:
    """Decides when a server ends.

    The port stays open meanwhile, so that newcomers get a 503 instead of a refused connection.

    Args:
        workers: whose admitted images are waited for.
        seconds: that they get to finish.

    Attributes:
        dropped: how many admitted images were still unanswered when the server gave up waiting for them.
    """

    def __init__(self, workers: Workers, seconds: float) -> None:
        self.workers = workers
        self.seconds = seconds
        self.dropped = 0
        self._until = float("inf")

    def begin(self, sig: int) -> None:
        """Begin to drain; a second signal ends it."""
        if self.workers.state.draining:
            self._until = 0.0
            return
        self.workers.state.draining = True
        self._until = time.monotonic() + self.seconds
        logger.info("%s: finishing %d image(s)", signal.Signals(sig).name, self.workers.state.admitted)

    def over(self) -> bool:
        """Whether it is time to end; then what is not answered yet is refused."""
        state = self.workers.state
        late = time.monotonic() > self._until
        if state.fatal is None and not late and not (state.draining and state.admitted == 0):
            return False
        if state.admitted:
            self.dropped += state.admitted
            logger.error("%d admitted image(s) could not be answered before the end", state.admitted)
        self.workers.fail_pending("the server is shutting down: try another one, or again later")
        return True
