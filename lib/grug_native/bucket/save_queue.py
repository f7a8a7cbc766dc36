"""Saves that wait in the host's memory for their turn to be written, one at a time and in order."""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import final

import psutil

logger = logging.getLogger(__name__)

_PATIENTLY = 30.0
"""Seconds that a save is waited for before the next one; by then the store is slow, or in trouble."""
_LOOK = 1.0
"""Seconds between two looks at a save that is waited for in any case."""


@final
class SaveQueue:
    """Runs saves on a thread of its own."""

    def __init__(self) -> None:
        self._saves: deque[tuple[Future[None], float]] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="grug-checkpoint")

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return any(not save.done() for save, _ in self._saves)

    def add(self, save: Callable[[], None]) -> None:
        """Begins a save once those before it are done."""
        self._saves.append((self._worker.submit(save), time.monotonic()))

    def check(self) -> None:
        """Raises what a save that is over has failed with; never waits."""
        while self._saves and self._saves[0][0].done():
            self._saves.popleft()[0].result()

    def make_room(self, needed: int) -> None:
        """Waits for the saves under way; not for ever, as long as another copy of `needed` bytes fits beside theirs."""
        while self._saves:
            save, since = self._saves[0]
            fits = psutil.virtual_memory().available > 2 * needed
            done, _ = wait([save], max(since + _PATIENTLY - time.monotonic(), 0.0) if fits else _LOOK)
            if done:
                self.check()
            elif fits:
                logger.warning("an earlier save is not done after %.0f s; the run goes on beside it", _PATIENTLY)
                return

    def wait(self) -> None:
        """Waits for all; raises what they failed with."""
        while self._saves:
            self._saves.popleft()[0].result()

    def close(self) -> None:
        """Waits for all, in any case; raises what the first of them failed with, and then begins no other."""
        try:
            self.wait()
        finally:
            self._saves.clear()
            self._worker.shutdown(cancel_futures=True)
