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
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, final

import jax
import jax.numpy as jnp

from grug_native.bucket.place import files_of, kept_in
from grug_native.checkpoint.orbax_io import Restored
from grug_native.components import RunParts
from grug_native.config import config_to_dict, save_own_config
from grug_native.data.loader import iter_from_step
from grug_native.hooks import Evaluations
from grug_native.host.fault_injection import fault_point
from grug_native.host.run_folder import RESULTS_FILE
from grug_native.host.signals import StopSignal
from grug_native.host.streams import lasting_streams
from grug_native.plan import build_plan, starting_parameters
from grug_native.resume import as_begun, check_data_offset, check_steps
from grug_native.saving import Checkpointer, open_checkpointer, record_data
from grug_native.state import GrugTrainState
from grug_native.step_log import StepLog
from grug_native.tracking.jsonl import build_trackers
from grug_native.tracking.profile import StepProfile, profile_window
from grug_native.tracking.progress import ProgressLine, StartUp, messages_shown
from grug_native.tracking.run_log import RunLog
from grug_native.train import StepMetrics

if TYPE_CHECKING:
    from levanter.data.text.examples import GrugLmExample

logger = logging.getLogger(__name__)


class EvaluationError(RuntimeError):
    """The training ended well, and an evaluation on the way did not."""


def train(parts: RunParts, *, stop_after: int | None, resume_step: int | None) -> GrugTrainState:
    """Runs the loop; see `GrugRunner.fit`."""
    trainer = parts.config.trainer
    check_steps(parts.config, stop_after=stop_after, resume_step=resume_step)
    last = trainer.num_train_steps if stop_after is None else min(stop_after, trainer.num_train_steps)
    with ExitStack() as stack:
        run = _OpenRun(parts, stack, resume_step)
        state, step = run.state, run.start
        while not run.settle(state, step, last):
            batch = run.next_batch(state, step)
            if batch is None:  # told to stop while the data were late
                continue
            state, metrics = run.update(state, batch, step)
            run.report(metrics, step)
            step += 1
    if run.stop.exit_code is not None:
        if not hasattr(sys, "ps1"):
            raise SystemExit(run.stop.exit_code)
    elif run.evaluations.failed:
        failed = run.evaluations.failed
        raise EvaluationError(f"the steps are done, but {failed} evaluation(s) failed; the log has each")
    return state


@final
class _OpenRun:
    """All that surrounds the loop: opened here, and closed by the stack."""

    def __init__(self, parts: RunParts, stack: ExitStack, resume_step: int | None):
        """Finds what is wrong with the run, opens its data, takes its lock, and loads the state to go on from."""
        config, trainer = parts.config, parts.config.trainer
        folder, self._process = files_of(config.output_path), jax.process_index()
        self._parts, self._stack, self._start_up = parts, stack, StartUp()
        stack.enter_context(lasting_streams())
        stack.enter_context(messages_shown())
        log_file = stack.enter_context(RunLog())
        plan = build_plan(parts)  # What can be known to be wrong is found now, before anything is compiled.
        logger.info("%s", plan.in_a_line)
        goes_on_from = (plan.resumes_from or 0) if resume_step is None else resume_step
        resumes = plan.resumes_from is not None if resume_step is None else resume_step > 0
        if starts_with := starting_parameters(parts, resumes=resumes):
            logger.info("starts with %s", starts_with)
        self._compiling = parts.compile_ahead(trainer.batch_size_at(goes_on_from))
        with self._start_up.data():  # It may tokenize for hours; there is nothing to save yet, and a signal ends it.
            loader, _ = parts.loader, parts.data_fingerprint
        self.stop = stack.enter_context(StopSignal())
        self.stop.nothing_to_lose = jax.process_count() == 1
        stack.enter_context(jax.set_mesh(parts.mesh))
        self._checkpointer = stack.enter_context(open_checkpointer(parts))
        if self._process == 0:
            log_file.keep(folder, kept_in(config.output_path))
        self._checkpointer.preflight(parts.state_shape)
        restored = _restore(self._checkpointer, parts, resume_step)
        self.state, self.start = restored.state, 0 if restored.metadata is None else restored.metadata.step
        assert int(self.state.step) == self.start
        if restored.metadata is not None:
            check_data_offset(trainer, restored.metadata)
        elif parts.origin is not None:
            self._checkpointer.originate(parts.origin.in_words)
        if self._process == 0:
            save_own_config(as_begun(parts, fresh=restored.metadata is None))
            record_data(parts)
        self._checkpointer.begin(self.start)
        self._checkpointer.keep_files()
        tracker = build_trackers(trainer.trackers, folder, config.run_id, start_step=self.start)
        stack.callback(tracker.finish)
        tracker.log_hyperparameters(config_to_dict(config))
        progress = ProgressLine(trainer.num_train_steps, start_step=self.start, note=log_file.note)
        stack.callback(progress.close)
        skipped = 0 if restored.metadata is None else restored.metadata.skipped_steps
        self._log = StepLog(parts, tracker, progress, self._checkpointer, skipped=skipped)
        self.evaluations = Evaluations(parts, tracker, start_step=self.start)
        self.evaluations.check(self.state)
        window = profile_window(trainer.profile, trainer.num_train_steps)
        self._profile = StepProfile(window, folder, start_step=self.start)
        stack.callback(self._profile.close)
        self._batches = iter_from_step(loader, self.start, interrupted=lambda: self.stop.exit_code is not None)
        stack.callback(self._batches.close)
        self._waited = self._dispatched = 0.0

    def settle(self, state: GrugTrainState, step: int, last: int) -> bool:
        """Does what is due at the boundary before a step: save, evaluate, profile. Says whether to stop there."""
        self._checkpointer.check()
        stopping = self.stop.should_stop() or step >= last
        kind = self._checkpointer.due(step) if step > self.start else None
        evaluating = self.evaluations.is_due(step)
        if stopping or kind is not None or evaluating:
            self._log.flush()
        if stopping or kind is not None:
            self.stop.nothing_to_lose = False
            permanent = step == self._parts.config.trainer.num_train_steps or kind == "permanent"
            self._save(state, step, permanent=permanent)
        if evaluating and self.stop.exit_code is None:
            self.evaluations.run(state, step)
            if self.stop.exit_code is not None:
                # An evaluation left off is done anew by who resumes; so this is where to stop.
                return self.settle(state, step, last)
        if stopping:
            if self.stop.exit_code is not None:
                logger.warning("stopping after %d steps; the same command goes on from there", step)
            return True
        if profiling := self._profile.turns_at(step):
            self._log.flush()
            self._profile.turn(step)
        if kind is not None or evaluating or profiling:
            self._log.restart_clock()
        self._profile.begin(step)
        return False

    def next_batch(self, state: GrugTrainState, step: int) -> "GrugLmExample | None":
        """Waits for the batch of a step; None if the run is told to stop while it waits."""
        waiting_since = time.perf_counter()
        try:
            fault_point("data", step, process=self._process)
            with self._profile.part("data"), self._start_up.data() if step == self.start else nullcontext():
                batch = next(self._batches, None)
        except Exception:
            # The state is good. With several processes the others are elsewhere, and would not take part.
            if step > self.start and jax.process_count() == 1:
                self._log.flush()
                self._save(state, step, permanent=False)
            raise
        self._waited = time.perf_counter() - waiting_since
        return batch

    def update(self, state: GrugTrainState, batch: "GrugLmExample", step: int) -> tuple[GrugTrainState, StepMetrics]:
        """Dispatches a step; `state` is donated."""
        if step == self.start:
            fault_point("compile", step, process=self._process)
            self._compiling.result()  # A wait that a signal interrupts, as a compilation does not.
        if fault_point("step", step, process=self._process) == "nan":
            batch = dataclasses.replace(batch, loss_weight=batch.loss_weight * jnp.nan)
        self._dispatched = time.perf_counter()
        with self._profile.part("step"):
            return self._parts.compiled_step(batch.tokens.shape[0])(state, batch)

    def report(self, metrics: StepMetrics, step: int) -> None:
        """Takes the metrics of the step just dispatched, and logs those of the one before."""
        with self._profile.part("log"):
            self._log.push(step, metrics, self._waited)
        self.stop.nothing_to_lose = False
        if step == self.start:
            self._log.flush()
            compilation = time.perf_counter() - self._dispatched
            self._start_up.report(evaluation=self.evaluations.seconds, compilation=compilation)
            # What is alive now stays: scanning it again and again would stall the loop.
            gc.freeze()
            self._stack.callback(gc.unfreeze)

    def _save(self, state: GrugTrainState, step: int, *, permanent: bool) -> None:
        checkpointer = self._checkpointer
        start_save = checkpointer.save_step_checkpoint if permanent else checkpointer.save_temporary_checkpoint
        offset = self._parts.config.trainer.data_offset(step)
        start_save(state, step=step, data_offset=offset, skipped_steps=self._log.skipped)


def _restore(checkpointer: Checkpointer, parts: RunParts, resume_step: int | None) -> Restored[GrugTrainState]:
    """Loads the state to go on from. Newer ones are put away once it is known to be sound."""
    chosen = checkpointer.restore(parts.state_shape, step=resume_step) if resume_step else None
    if resume_step is not None:
        if jax.process_index() == 0:
            (files_of(parts.config.output_path) / RESULTS_FILE).unlink(missing_ok=True)
        checkpointer.rollback(resume_step)
    if chosen is not None:
        logger.info("resuming from %s", checkpointer.where(resume_step or 0))
        return chosen
    return checkpointer.restore_latest_or_initialize(parts.init_state, parts.state_shape)
