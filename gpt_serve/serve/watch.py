"""The adapter folder as a whole: a missing one must not look like one without tasks."""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt_serve.serve.state import ServerState

logger = logging.getLogger("gpt_serve.serve")

PERIOD = 2.0  # seconds between two looks
PATIENCE = 5.0  # seconds that a look may take


class StoreWatch:
    """Keeps ``state.store_fault`` up to date, and logs when it changes.

    A store that is elsewhere has nothing to be watched here: what was fetched from it is served while it is away.

    Args:
        adapters: the folder, or the address of a store.
        state: says what is wrong.
    """

    def __init__(self, adapters: Path | str, state: ServerState) -> None:
        self.state = state
        self.root = Path(adapters)
        self.is_folder = isinstance(adapters, Path) or "://" not in adapters
        self._device: int | None = None  # of the folder when it last held anything
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")  # a hung file system holds it alone

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        while not self.is_folder:
            await asyncio.sleep(PERIOD)
        while True:
            look = loop.run_in_executor(self._thread, self._fault)
            try:
                self._report(await asyncio.wait_for(asyncio.shield(look), PATIENCE))
            except TimeoutError:
                self._report("the adapter folder does not answer")
                self._report(await look)
            await asyncio.sleep(PERIOD)

    def _fault(self) -> str:
        """What is wrong with the folder, in words that name no path; empty if nothing is."""
        try:
            status, empty = os.stat(self.root), _is_empty(self.root)
        except FileNotFoundError:
            return "the adapter folder is missing"
        except OSError as error:
            return f"the adapter folder cannot be read ({error.strerror})"
        if not empty:
            self._device = status.st_dev
        if empty and self._device not in (None, status.st_dev):
            return "the adapter folder is empty and on another file system than before: it is not mounted"
        return ""

    def _report(self, fault: str) -> None:
        if fault and fault != self.state.store_fault:
            logger.error("%s: %s", fault, self.root)
        if self.state.store_fault and not fault:
            logger.info("the adapter folder is there again: %s", self.root)
        self.state.store_fault = fault


def _is_empty(root: Path) -> bool:
    with os.scandir(root) as entries:
        return next(entries, None) is None
