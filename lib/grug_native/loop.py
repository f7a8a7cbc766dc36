"""The training loop.

The order of work, which everything else relies on:

1. at the boundary before step `t`: save if due, evaluate if due, stop if asked to (and before any of these, read what
   is pending);
2. dispatch step `t` on its batch, which is already on the devices;
3. read and log the metrics of step `t - 1`, while the devices work on `t`.

So row `t` of `metrics.jsonl` has the losses of the parameters after `t` updates, whether a training step or an
evaluation wrote them, and the checkpoint `step-t` holds exactly those parameters. (The update that step `t` then makes,
its norm and that of what it leads to stand there too.)
"""

import dataclasses
import gc
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import final

import jax
import jax.numpy as jnp
import numpy as np

from grug_native.checkpoint.checkpointer import GrugCheckpointer
from grug_native.checkpoint.orbax_io import Restored
from grug_native.components import RunParts
from grug_native.config import GrugTrainerConfig, config_to_dict, save_own_config
from grug_native.data.loader import iter_from_step, mixture_metrics
from grug_native.hooks import Evaluations
from grug_native.host.fault_injection import fault_point
from grug_native.host.run_folder import RESULTS_FILE, committed_steps, local_path, step_name
from grug_native.host.shell import offer
from grug_native.host.signals import StopSignal
from grug_native.host.streams import lasting_streams
from grug_native.metrics import peak_memory
from grug_native.plan import build_plan
from grug_native.resume import check_data_offset, check_steps
from grug_native.saving import open_checkpointer, record_data
from grug_native.state import GrugTrainState
from grug_native.tracking.jsonl import RunTracker, build_trackers
from grug_native.tracking.profile import StepProfile, profile_window
from grug_native.tracking.progress import ProgressLine, StartUp, messages_shown
from grug_native.tracking.run_log import RunLog
from grug_native.train import WATCHED, StepMetrics

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss, gradient, update or parameter is not finite; nothing of it was saved."""


class EvaluationError(RuntimeError):
    """The training ended well, and an evaluation on the way did not."""


def train(parts: RunParts, *, stop_after: int | None, resume_step: int | None) -> GrugTrainState:
    """Runs the loop; see `GrugRunner.fit`."""
    start_up = StartUp()
    config, trainer = parts.config, parts.config.trainer
    check_steps(config, stop_after=stop_after, resume_step=resume_step)
    last = trainer.num_train_steps if stop_after is None else min(stop_after, trainer.num_train_steps)
    folder, process = local_path(config.output_path), jax.process_index()
    with ExitStack() as stack:
        stack.enter_context(lasting_streams())
        stack.enter_context(messages_shown())
        log_file = stack.enter_context(RunLog())
        plan = build_plan(parts)  # What can be known to be wrong is found now, before anything is compiled.
        logger.info("%s", plan.in_a_line)
        goes_on_from = (plan.resumes_from or 0) if resume_step is None else resume_step
        compiling = parts.compile_ahead(trainer.batch_size_at(goes_on_from))
        with start_up.data():  # It may tokenize for hours; there is nothing to save yet, and a signal ends it.
            loader, _ = parts.loader, parts.data_fingerprint
        stop = stack.enter_context(StopSignal())
        stop.nothing_to_lose = jax.process_count() == 1
        stack.enter_context(jax.set_mesh(parts.mesh))
        checkpointer = stack.enter_context(open_checkpointer(parts))
        if process == 0:
            log_file.keep(folder)
        checkpointer.preflight(parts.state_shape)
        restored = _restore(checkpointer, parts, resume_step)
        state, start = restored.state, 0 if restored.metadata is None else restored.metadata.step
        assert int(state.step) == start
        if restored.metadata is not None:
            check_data_offset(trainer, restored.metadata)
        if process == 0:
            save_own_config(config)
            record_data(parts)
        tracker = build_trackers(trainer.trackers, folder, config.run_id, start_step=start)
        stack.callback(tracker.finish)
        tracker.log_hyperparameters(config_to_dict(config))
        progress = ProgressLine(trainer.num_train_steps, start_step=start, note=log_file.note)
        stack.callback(progress.close)
        skipped = 0 if restored.metadata is None else restored.metadata.skipped_steps
        log = _StepLog(parts, tracker, progress, checkpointer, skipped=skipped)
        evaluations = Evaluations(parts, tracker, start_step=start)
        evaluations.check(state)
        profile = StepProfile(profile_window(trainer.profile, trainer.num_train_steps), folder, start_step=start)
        stack.callback(profile.close)
        batches = iter_from_step(loader, start, interrupted=lambda: stop.exit_code is not None)
        stack.callback(batches.close)
        step = start
        while True:
            checkpointer.check()
            stopping = stop.should_stop() or step >= last
            kind = checkpointer.due(step) if step > start else None
            evaluating = evaluations.is_due(step)
            if stopping or kind is not None or evaluating:
                log.flush()
            if stopping or kind is not None:
                stop.nothing_to_lose = False
                permanent = step == trainer.num_train_steps or kind == "permanent"
                _save(checkpointer, trainer, state, step, log.skipped, permanent=permanent)
            if evaluating and stop.exit_code is None:
                evaluations.run(state, step)
                if stop.exit_code is not None:
                    continue  # An evaluation left off is done anew by who resumes; so this is where to stop.
            if stopping:
                if stop.exit_code is not None:
                    logger.warning("stopping after %d steps; the same command goes on from there", step)
                break
            if profiling := profile.turns_at(step):
                log.flush()
                profile.turn(step)
            if kind is not None or evaluating or profiling:
                log.restart_clock()
            profile.begin(step)
            waiting_since = time.perf_counter()
            try:
                fault_point("data", step, process=process)
                with profile.part("data"), start_up.data() if step == start else nullcontext():
                    batch = next(batches, None)
            except Exception:
                # The state is good. With several processes the others are elsewhere, and would not take part.
                if step > start and jax.process_count() == 1:
                    log.flush()
                    _save(checkpointer, trainer, state, step, log.skipped, permanent=False)
                raise
            loading_time = time.perf_counter() - waiting_since
            if batch is None:  # told to stop while the data were late
                continue
            if step == start:
                fault_point("compile", step, process=process)
                compiling.result()  # A wait that a signal interrupts, as a compilation does not.
            if fault_point("step", step, process=process) == "nan":
                batch = dataclasses.replace(batch, loss_weight=batch.loss_weight * jnp.nan)
            dispatched = time.perf_counter()
            with profile.part("step"):
                state, metrics = parts.compiled_step(batch.tokens.shape[0])(state, batch)
            with profile.part("log"):
                log.push(step, metrics, loading_time)
            stop.nothing_to_lose = False
            if step == start:
                log.flush()
                start_up.report(evaluation=evaluations.seconds, compilation=time.perf_counter() - dispatched)
                # What is alive now stays: scanning it again and again would stall the loop.
                gc.freeze()
                stack.callback(gc.unfreeze)
            step += 1
    if stop.exit_code is not None:
        if not hasattr(sys, "ps1"):
            raise SystemExit(stop.exit_code)
    elif evaluations.failed:
        raise EvaluationError(f"the steps are done, but {evaluations.failed} evaluation(s) failed; the log has each")
    return state


def _restore(checkpointer: GrugCheckpointer, parts: RunParts, resume_step: int | None) -> Restored[GrugTrainState]:
    """Loads the state to go on from. Newer ones are put away once it is known to be sound."""
    chosen = checkpointer.restore(parts.state_shape, step=resume_step) if resume_step else None
    if resume_step is not None:
        if jax.process_index() == 0:
            (checkpointer.folder.parent / RESULTS_FILE).unlink(missing_ok=True)
        checkpointer.rollback(resume_step)
    if chosen is not None:
        logger.info("resuming from %s", checkpointer.folder / step_name(resume_step or 0))
        return chosen
    return checkpointer.restore_latest_or_initialize(parts.init_state, parts.state_shape)


def _save(
    checkpointer: GrugCheckpointer,
    trainer: GrugTrainerConfig,
    state: GrugTrainState,
    step: int,
    skipped_steps: int,
    *,
    permanent: bool,
) -> None:
    start_save = checkpointer.save_step_checkpoint if permanent else checkpointer.save_temporary_checkpoint
    start_save(state, step=step, data_offset=trainer.data_offset(step), skipped_steps=skipped_steps)


@final
class _StepLog:
    """Reads each step's metrics one step late, guards against what is not finite, and logs."""

    def __init__(
        self,
        parts: RunParts,
        tracker: RunTracker,
        progress: ProgressLine,
        checkpointer: GrugCheckpointer,
        *,
        skipped: int,
    ):
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
        saved = committed_steps(self._checkpointer.folder)
        last = self._checkpointer.folder / step_name(saved[0]) if saved else "none: the run had saved nothing yet"
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
