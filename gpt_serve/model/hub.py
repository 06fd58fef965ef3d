"""The Hugging Face hub, where it cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from huggingface_hub import constants, get_session

PATIENCE = 5.0
"""Seconds in which the hub must answer once, whatever it says."""


@contextmanager
def offline_without_answer(patience: float = PATIENCE) -> Iterator[None]:
    """Inside, an unreachable hub counts as offline: what is cached is used, and what is not is an error at once.

    Without this, `huggingface_hub` waits and asks again for every file: half a minute each.
    """
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not _answers(patience)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _answers(patience: float) -> bool:
    """Asked in a thread of its own, because nothing limits how long a name may take to be looked up."""
    answers = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=patience)
            answers.append(True)
        except Exception:  # whatever the HTTP stack raises: there is no answer
            answers.append(False)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answers == [True]
