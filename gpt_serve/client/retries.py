"""When a request is sent again, and after how long."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

AGAIN = (429, 502, 503)
"""Statuses that say "not now". A 504 is none: its request has had all its time."""


@dataclass(frozen=True)
class Retries:
    """How patient a client is.

    Attributes:
        attempts: how often a request is sent at most.
        patience: most seconds that the pauses between the attempts of one request take together. When the next one
            would exceed it, for example because the server asks for a minute, the refusal is raised at once.
        first_pause: seconds before the second attempt when the server names none; each further pause is twice as long.
    """

    attempts: int = 4
    patience: float = 15.0
    first_pause: float = 0.25


class Attempts:
    """The attempts of one request, for a client that waits in its own way."""

    def __init__(self, retries: Retries) -> None:
        self.retries = retries
        self.made = 0
        self.waited = 0.0

    def pause(self, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds to wait before another attempt; None when ``outcome`` is the last."""
        self.made += 1
        if self.made >= self.retries.attempts:
            return None
        if isinstance(outcome, httpx.Response) and outcome.status_code not in AGAIN:
            return None
        seconds = self._asked_for(outcome)
        if seconds is None:  # spread out, so that clients that were turned away together do not return together
            seconds = self.retries.first_pause * 2 ** (self.made - 1) * random.uniform(0.5, 1.5)
        if self.waited + seconds > self.retries.patience:
            return None
        self.waited += seconds
        return seconds

    def _asked_for(self, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """What ``Retry-After`` says: seconds or a date (RFC 9110, section 10.2.3)."""
        text = outcome.headers.get("retry-after", "") if isinstance(outcome, httpx.Response) else ""
        if text.isascii() and text.isdecimal():
            return float(text)
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - datetime.now(UTC).timestamp())
        except (TypeError, ValueError):
            return None
