"""From a signal to the end: nothing new is admitted, what is admitted is finished."""

import logging
import signal
import time

from gpt_serve.serve.server import Server

logger = logging.getLogger("gpt_serve.serve")


class Drain:
    """Decides when a server ends.

    The port stays open meanwhile, so that newcomers get a 503 instead of a refused connection.

    Args:
        server: whose admitted images are waited for.

    Attributes:
        dropped: how many admitted images were still unanswered when the server gave up waiting for them.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.dropped = 0
        self._until = float("inf")

    def begin(self, sig: int) -> None:
        """Begin to drain; a second signal ends it."""
        if self.server.state.draining:
            self._until = 0.0
            return
        self.server.state.draining = True
        self._until = time.monotonic() + self.server.config.drain
        logger.info("%s: finishing %d image(s)", signal.Signals(sig).name, self.server.state.admitted)

    def over(self) -> bool:
        """Whether it is time to end; then what is not answered yet is refused."""
        state = self.server.state
        late = time.monotonic() > self._until
        if state.fatal is None and not late and not (state.draining and state.admitted == 0):
            return False
        if state.admitted:
            self.dropped += state.admitted
            logger.error("%d admitted image(s) could not be answered before the end", state.admitted)
        self.server.fail_pending("the server is shutting down: try another one, or again later")
        return True
