"""What each step has measured: read one step late, checked, and logged."""

import logging
import time
from collections.abc import Mapping
from typing import final

import jax
import numpy as np

from grug_native.components import RunParts
from grug_native.data.loader import mixture_metrics
from grug_native.host.fault_injection import fault_point
from grug_native.host.shell import offer
from grug_native.metrics import peak_memory
from grug_native.saving import Checkpointer
from grug_native.tracking.jsonl import RunTracker
from grug_native.tracking.progress import ProgressLine
from grug_native.train import WATCHED, StepMetrics

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss, gradient, update or parameter is not finite; nothing of it was saved."""


@final
class StepLog:
    """Reads each step's metrics one step late, guards against what is not finite, and logs."""

    def __init__(
        self,
        parts: RunParts,
        tracker: RunTracker,
        progress: ProgressLine,
        checkpointer: Checkpointer,
        *,
        skipped: int,
    ):
        """Takes `skipped`, the steps that were not finite before this start."""
        self._parts = parts
        self._tracker = tracker
        self._progress = progress
        self._checkpointer = checkpointer
        self.skipped = skipped
        """Steps since the run began that were not finite, of those that have been read."""
        self._pending: tuple[int, StepMetrics, float] | None = None
        self._last_done = time.perf_counter()

    def push(self, step: int, metrics: StepMetrics, loading_time: float) -> None:
        """Takes the metrics of a step just dispatched, and logs those of the one before."""
        self.flush()
        self._pending = (step, metrics, loading_time)

    def flush(self) -> None:
        """Waits for the pending metrics, and logs them."""
        if self._pending is None:
            return
        (step, pending, loading_time), self._pending = self._pending, None
        metrics = jax.device_get(pending)
        done = time.perf_counter()
        duration, self._last_done = done - self._last_done, done
        if metrics.nonfinite:
            self._guard(step, metrics)
        trainer = self._parts.config.trainer
        sequences = trainer.batch_size_at(step)
        throughput = self._parts.throughput.metrics(
            sequences=sequences,
            data_offset=trainer.data_offset(step + 1),
            duration=duration,
            loading_time=loading_time,
        )
        if step % trainer.log_every == 0 or step == trainer.num_train_steps - 1:
            fault_point("log", step, process=jax.process_index())
            self._tracker.log(
                {
                    "train/loss": metrics.loss,
                    "optim/learning_rate": metrics.learning_rate,
                    "grad/norm/total": metrics.grad_norm,
                    "updates/norm/total": metrics.update_norm,
                    "params/norm/total": metrics.param_norm,
                    "train/skipped_steps": self.skipped,
                    "data/batch_digest": metrics.batch_digest,
                    "run_progress": (step + 1) / trainer.num_train_steps,
                    **mixture_metrics(self._parts.dataset, self._parts.batch_schedule, step),
                    **_measured(metrics.extra, step, trainer.watch_every),
                    **throughput,
                },
                step=step,
            )
        self._progress.update(
            step + 1,
            loss=float(metrics.loss),
            learning_rate=float(metrics.learning_rate),
            throughput=throughput,
            memory=peak_memory(),
        )

    def restart_clock(self) -> None:
        """Keeps what happened between two steps, a save or an evaluation, out of the next step's duration."""
        self._last_done = time.perf_counter()

    def _guard(self, step: int, metrics: StepMetrics) -> None:
        trainer = self._parts.config.trainer
        self.skipped += 1
        first, end = trainer.data_offset(step), trainer.data_offset(step + 1)
        what = (
            f"step {step} is not finite: loss {metrics.loss}, gradient norm {metrics.grad_norm}, update norm "
            f"{metrics.update_norm}, parameter norm {metrics.param_norm}; its batch: sequences {first} to {end - 1}"
        )
        if trainer.nonfinite == "skip" and self.skipped <= trainer.max_skipped_steps:
            logger.warning("%s; skipped (%d of at most %d)", what, self.skipped, trainer.max_skipped_steps)
            return
        logger.error("%s", what)
        self._checkpointer.wait()
        saved = self._checkpointer.steps()
        last = self._checkpointer.where(saved[0]) if saved else "none: the run had saved nothing yet"
        way_out = (
            "to leave such steps out, give "
            f"{offer('trainer.nonfinite', 'skip')} {offer('trainer.allow_changes', '[trainer.nonfinite]')}"
            if trainer.nonfinite == "stop"
            else f"raise trainer.max_skipped_steps={trainer.max_skipped_steps}, which bounds those of the whole run"
        )
        raise NonFiniteError(
            f"{what} (`runner.show_batch({step})`). Nothing of it was saved; the last good checkpoint is {last}; "
            f"{way_out}"
        )


def _measured(extra: Mapping[str, np.ndarray], step: int, watch_every: int | None) -> dict[str, float]:
    """What a step reports beside the usual, number by number, without what was not measured at this step."""
    watching = watch_every is not None and step % watch_every == 0
    numbers: dict[str, float] = {}
    for name, value in extra.items():
        if watching or not name.startswith(WATCHED):
            numbers |= (
                {name: float(value)}
                if value.ndim == 0
                else {f"{name}/{place}": float(number) for place, number in enumerate(value.ravel())}
            )
    return numbers
