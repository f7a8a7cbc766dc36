"""levanter's trackers, each on a thread of its own, so that none of them can harm a run."""

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, final, runtime_checkable

import jax

logger = logging.getLogger(__name__)

QUEUE_SIZE = 10_000
"""How many calls may wait for a slow tracker; what comes on top is dropped, and counted."""


@runtime_checkable
class Tracker(Protocol):
    """What a run asks of a tracker: a part of levanter's `Tracker`, seen without importing levanter."""

    name: str
    """What the tracker is called in a message."""

    def log(self, metrics: Mapping[str, Any], *, step: int | None, commit: bool | None = None) -> None:
        """Records the metrics of a step."""
        ...

    def log_hyperparameters(self, hparams: dict[str, Any]) -> None:
        """Records the settings of the run."""
        ...

    def log_summary(self, metrics: dict[str, Any]) -> None:
        """Records numbers that belong to the whole run."""
        ...

    def finish(self) -> None:
        """Sends what is left and closes."""
        ...


@runtime_checkable
class TrackerConfig(Protocol):
    """levanter's `TrackerConfig` (wandb, tensorboard, trackio, ...), seen without importing levanter."""

    def init(self, run_id: str | None) -> Tracker:
        """Makes the tracker; may take long, and may fail."""
        ...


@final
class ExternalTracker:
    """One of levanter's trackers, run on a thread; its methods neither block nor raise.

    levanter's `BackgroundTracker` does this for a tracker that has started. Here the start is on the thread too
    (wandb's waits 90 s for a server that does not answer), a tracker that is down costs one warning and not a
    traceback a step, and one that is given up does not hold up the exit of Python.
    """

    def __init__(self, config: TrackerConfig, run_id: str, *, start_step: int, finish_timeout: float):
        """Starts the thread.

        Args:
            config: One of levanter's.
            run_id: Name of the run.
            start_step: The first step that will be logged.
            finish_timeout: Seconds that `finish` may take.
        """
        self.name = type(config).__name__
        self._config, self._is_wandb = _adjusted(config, run_id, start_step)
        self._run_id = run_id
        self._finish_timeout = finish_timeout
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._dropped = 0
        self._failures = 0
        self._tracker: Tracker | None = None
        # With several processes the start of wandb is an exchange between all of them, and has to keep its place among
        # the others: on the calling thread.
        several = jax.process_count() > 1
        if several:
            self._start()
        self._thread = threading.Thread(target=self._work, args=(not several,), name=self.name, daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, Any], *, step: int | None, commit: bool | None = None) -> None:
        """Has the metrics of a step recorded."""
        self._put(lambda tracker: tracker.log(metrics, step=step, commit=commit))

    def log_hyperparameters(self, hparams: dict[str, Any]) -> None:
        """Has the settings of the run recorded."""
        self._put(lambda tracker: tracker.log_hyperparameters(hparams))

    def log_summary(self, metrics: dict[str, Any]) -> None:
        """Has numbers of the whole run recorded."""
        self._put(lambda tracker: tracker.log_summary(metrics))

    def finish(self) -> None:
        """Waits until everything is recorded, or the time is up."""
        self._calls.put(None)
        self._thread.join(self._finish_timeout)
        if self._dropped:
            logger.warning("%s was too slow: %d calls were dropped", self.name, self._dropped)
        if self._failures > 1:
            logger.warning("%s failed %d times in all", self.name, self._failures)
        if not self._thread.is_alive():
            return
        logger.warning("%s did not finish within %g s and is given up", self.name, self._finish_timeout)
        if self._is_wandb:
            import wandb

            # Else wandb's hook at the exit of Python waits for the upload, for ever. A teardown waits as well, but it
            # takes the hook away first, and nobody waits for its thread.
            teardown = threading.Thread(target=wandb.teardown, name=f"{self.name}-teardown", daemon=True)
            teardown.start()
            teardown.join(1.0)

    def _put(self, call: Callable[[Tracker], None]) -> None:
        if not self._thread.is_alive():
            return
        if self._calls.qsize() >= QUEUE_SIZE:
            self._dropped += 1
        else:
            self._calls.put(call)

    def _work(self, start: bool) -> None:
        if start:
            self._start()
        if self._tracker is None:
            return
        while (call := self._calls.get()) is not None:
            self._attempt(call, self._tracker)
        self._attempt(lambda tracker: tracker.finish(), self._tracker)

    def _start(self) -> None:
        try:
            self._tracker = self._config.init(self._run_id)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the run outlives it
            logger.warning("%s could not start, the run goes on without it: %r", self.name, error)
        if self._is_wandb:
            from levanter.tracker import wandb as levanter_wandb

            # levanter's hook for the exit starts a thread, which Python 3.12 refuses there with a traceback.
            atexit.unregister(levanter_wandb._teardown_wandb_service_bounded)  # pyright: ignore[reportPrivateUsage]

    def _attempt(self, call: Callable[[Tracker], None], tracker: Tracker) -> None:
        try:
            call(tracker)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the run outlives it
            self._failures += 1
            if self._failures == 1:
                logger.warning("%s failed, the run goes on: %r; more of it is only counted", self.name, error)


def _adjusted(config: TrackerConfig, run_id: str, start_step: int) -> tuple[TrackerConfig, bool]:
    """The config as a run wants it (one background thread, ours; no code upload by default; no step twice).

    Also says whether it is wandb's. Called on the thread of the run: two threads may not import levanter at once.
    """
    from levanter.tracker.tensorboard import TensorboardConfig
    from levanter.tracker.trackio import TrackioConfig
    from levanter.tracker.wandb import WandbConfig

    if isinstance(config, WandbConfig):
        save_code = config.save_code if isinstance(config.save_code, str) else False
        return replace(config, background=False, save_code=save_code), True
    if isinstance(config, TrackioConfig):
        return replace(config, background=False, name=config.name or run_id), False  # else each start is a new run
    if isinstance(config, TensorboardConfig) and config.purge_step is None:
        return replace(config, purge_step=start_step), False
    return config, False
