"""When a run is saved, and what is kept of that."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import jax
import numpy as np
from jax.experimental import multihost_utils

from grug_native.checkpoint.metadata import CheckpointKind

_STEPS_BETWEEN_CLOCK_AGREEMENTS = 10


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When to save, and what to keep."""

    steps_per_checkpoint: int | None = None
    """A permanent checkpoint after every so many steps; None for only the one at the end."""
    minutes_per_temporary_checkpoint: float | None = 10.0
    """A temporary checkpoint when the last save is this many minutes ago; None for never."""
    keep_last: int = 2
    """The newest so many checkpoints are kept whatever their kind: with one more than one, a disk may rot."""

    def __post_init__(self) -> None:
        if self.steps_per_checkpoint is not None and self.steps_per_checkpoint < 1:
            raise ValueError(f"steps_per_checkpoint={self.steps_per_checkpoint} must be at least 1, or None for never")
        minutes = self.minutes_per_temporary_checkpoint
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes_per_temporary_checkpoint={minutes} must be above 0, or None for never")
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last} must be at least 1: the newest checkpoint is never deleted")


@final
class SaveSchedule:
    """Says when a save is due; time is looked at by process 0 alone."""

    def __init__(self, policy: CheckpointPolicy, clock: Callable[[], float] = time.monotonic):
        """Begins now.

        Args:
            policy: When to save.
            clock: Seconds, never going back.
        """
        self._policy, self._clock = policy, clock
        self._last_save = clock()

    def note_save(self) -> None:
        """Says that a save begins now."""
        self._last_save = self._clock()

    def due(self, step: int, *, saving: bool) -> CheckpointKind | None:
        """Returns the kind of save that is due after `step` updates, if any; no temporary one while `saving`.

        With several processes, time is looked at at every tenth step, as they have to agree.
        """
        every, minutes = self._policy.steps_per_checkpoint, self._policy.minutes_per_temporary_checkpoint
        if every is not None and step % every == 0:
            return "permanent"
        if minutes is None:
            return None
        elapsed = self._clock() - self._last_save >= 60 * minutes and not saving
        if jax.process_count() > 1:
            if step % _STEPS_BETWEEN_CLOCK_AGREEMENTS:
                return None
            elapsed = bool(multihost_utils.broadcast_one_to_all(np.array(elapsed)))
        return "temporary" if elapsed else None


def close_after(error: BaseException | None, close: Callable[[], None], what: str) -> None:
    """Closes a checkpointer at the end of its `with`; after an `error`, what `close` raises is only told with it."""
    try:
        close()
    except Exception as late:
        if error is None:
            raise
        error.add_note(f"{what} failed as well: {late!r}")
