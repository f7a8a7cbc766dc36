"""When a run is saved, what is kept, and where it goes on: the checkpoints of one run, under its lock."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import jax
from jax.experimental import multihost_utils

from grug_native.checkpoint.leaves import changed_leaves, state_bytes
from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointKind,
    CheckpointMetadata,
    CheckpointMismatchError,
    RunIdentity,
    check_identity,
    describe,
    read_metadata,
    write_metadata,
)
from grug_native.checkpoint.orbax_io import CheckpointIO, Commit, OrbaxCheckpointIO, Restored, restore_checkpoint
from grug_native.checkpoint.schedule import CheckpointPolicy, SaveSchedule, close_after
from grug_native.host.run_folder import (
    CHECKPOINTS_FOLDER,
    RunLock,
    check_disk,
    committed_steps,
    discard,
    find_checkpoint,
    fsync,
    quarantined,
    set_aside,
    step_name,
    sweep_leftovers,
    validate_run_id,
)
from grug_native.tracking.jsonl import METRICS_FILE

logger = logging.getLogger(__name__)


class GrugCheckpointer:
    """The checkpoints of one run: the only object that writes to its `checkpoints/` folder, and the holder of its lock.

    Every process of the run makes one and calls the same methods at the same steps. At most one save is under way; its
    background part reports an error at the next `check`, `save_*`, `wait` or `close`, whichever comes first.
    """

    def __init__(
        self,
        run_folder: Path,
        identity: RunIdentity,
        policy: CheckpointPolicy,
        *,
        io: CheckpointIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Takes the run's lock, and removes what a killed process of the same run left half-done.

        Args:
            run_folder: Of the run; made if missing.
            identity: What the run is; compared with every checkpoint before it is used.
            policy: When to save, and what to keep.
            io: How to write and read; Orbax without compression by default.
            clock: Seconds, never going back; only process 0's counts.

        Raises:
            RunLockedError: Another process is writing to the folder.
            ValueError: `identity.run_id` is no safe name.
        """
        self._run_id = validate_run_id(identity.run_id)
        self._identity = identity
        self._policy = policy
        self._io: CheckpointIO = OrbaxCheckpointIO() if io is None else io
        self._folder = run_folder / CHECKPOINTS_FOLDER
        self._lineage: tuple[str, ...] = ()
        self._pending: Future[None] | None = None
        self._lock: RunLock | None = None
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(run_folder, self._run_id)
            for name in sweep_leftovers(self._folder, self._run_id):
                logger.warning("removed %s, left half-done by a process that was killed", self._folder / name)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="grug-checkpoint")
        self._schedule = SaveSchedule(policy, clock)

    @property
    def folder(self) -> Path:
        """Where the `step-N` folders are."""
        return self._folder

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, newest first."""
        return committed_steps(self._folder)

    def where(self, step: int) -> str:
        """Returns where the checkpoint of a step is."""
        return str(self._folder / step_name(step))

    def originate(self, origin: str) -> None:
        """Says what the fresh run was made of: it heads the lineage of the checkpoints that follow."""
        self._lineage = (origin,)

    def begin(self, step: int) -> None:
        """Says that the run goes on from `step`; here the record is cut by whoever opens it."""

    def keep_files(self) -> None:
        """Makes the files that were written so far a part of the run; here they are one already."""

    @property
    def saving(self) -> bool:
        """Whether a save is under way in the background, on this process."""
        return self._pending is not None and not self._pending.done()

    def preflight(self, state_shape: object) -> None:
        """Checks that the state can be stored and that the disk has room for it; call it before anything is compiled.

        Raises:
            OSError: The folder cannot be written to, or its disk is too full.
            ValueError: A leaf of the state cannot be stored.
        """
        needed = state_bytes(state_shape)
        if jax.process_index() == 0:
            check_disk(self._folder, needed, kept=self._policy.keep_last)

    def due(self, step: int) -> CheckpointKind | None:
        """Returns the kind of save that the policy asks for after `step` updates, if any."""
        return self._schedule.due(step, saving=self.saving)

    def save_step_checkpoint(self, state: object, *, step: int, data_offset: int, skipped_steps: int = 0) -> None:
        """Starts to save `state` for good; returns once it is copied off the devices and may be donated.

        A checkpoint of this step that is there already is kept, and made permanent.

        Args:
            state: The whole train state.
            step: Updates done.
            data_offset: Sequences consumed.
            skipped_steps: Of the updates, those that were not finite and changed nothing.

        Raises:
            CheckpointError: An earlier save failed in the background; newer checkpoints are there, or another state of
                this step: `rollback` first.
            ValueError: A leaf of the state cannot be stored.
        """
        self._save(state, "permanent", step, data_offset, skipped_steps)

    def save_temporary_checkpoint(self, state: object, *, step: int, data_offset: int, skipped_steps: int = 0) -> None:
        """Starts to save `state` until newer ones are there; otherwise as `save_step_checkpoint`."""
        self._save(state, "temporary", step, data_offset, skipped_steps)

    def restore_latest_or_initialize[State](self, init: Callable[[], State], state_shape: State) -> Restored[State]:
        """Loads the newest sound checkpoint of the run, or makes a fresh state if it has never written one.

        Args:
            init: Makes the state of step 0.
            state_shape: Its shape: abstract arrays that carry their shardings.

        Raises:
            CheckpointMismatchError: The checkpoint is of another run, configuration, data or model.
            NoUsableCheckpointError: There are checkpoints, all damaged.
        """
        self.wait()
        found = self._io.restore_latest(self._folder, state_shape, accept=self.accept)
        if found is None:
            logger.info("no checkpoint in %s: starting from scratch", self._folder)
            return Restored(init(), None)
        assert found.metadata is not None
        logger.info("resuming from %s", self._folder / step_name(found.metadata.step))
        return found

    def restore[State](self, state_shape: State, *, step: int) -> Restored[State]:
        """Loads the checkpoint of `step`, and changes nothing on disk; `rollback` to it before going on from there.

        Raises:
            ValueError: There is none.
            CheckpointMismatchError: It is of another run, configuration, data or model.
            DamagedCheckpointError: It cannot be read, or is not what was saved.
        """
        self.wait()
        return restore_checkpoint(find_checkpoint(self._folder, step), state_shape, accept=self.accept)

    def rollback(self, step: int) -> list[int]:
        """Makes `step` the newest checkpoint: newer ones are renamed `.abandoned-step-N`; returns their steps.

        Step 0, the fresh start, needs no checkpoint; then those that were set aside as damaged are abandoned too.

        Raises:
            ValueError: There is no checkpoint of `step`.
        """
        self.wait()
        steps = committed_steps(self._folder)
        if step != 0 and step not in steps:
            raise ValueError(f"step={step} has no checkpoint in {self._folder}; there are {steps}")
        newer = [s for s in steps if s > step]
        self._barrier("rollback-listed")
        if jax.process_index() == 0:
            damaged = quarantined(self._folder) if step == 0 else []
            for path in [*(self._folder / step_name(s) for s in newer), *damaged]:
                logger.warning("moved to %s", set_aside(path, "abandoned"))
        self._barrier("rollback-done")
        return newer

    def accept(self, metadata: CheckpointMetadata) -> None:
        """Takes a checkpoint for the one to continue from: its lineage goes on in those that follow.

        Raises:
            CheckpointMismatchError: It is of another run, configuration or data.
        """
        self._lineage = check_identity(metadata, self._identity)

    def check(self) -> None:
        """Raises what the save in the background failed with, if it is over and has; never waits."""
        if self._pending is not None and self._pending.done():
            pending, self._pending = self._pending, None
            pending.result()

    def wait(self) -> None:
        """Waits until the save under way is committed, on every process; raises what it failed with."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
        self._barrier("saved")

    def close(self) -> None:
        """Waits for the save under way and gives the lock back, in any case; raises what the save failed with."""
        try:
            if self._pending is not None:
                self._pending.result()
        finally:
            self._pending = None
            self._worker.shutdown()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> "GrugCheckpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        close_after(error, self.close, "the save under way")

    def _save(self, state: object, kind: CheckpointKind, step: int, data_offset: int, skipped_steps: int) -> None:
        self.wait()
        self._schedule.note_save()
        path = self._folder / step_name(step)
        newest = max(committed_steps(self._folder), default=-1)
        if newest > step:
            raise CheckpointError(
                f"cannot save step {step}: {self._folder} holds step {newest}; rollback({step}) first"
            )
        if newest == step:
            self._keep(path, state, kind)
            return
        if path.is_symlink() or path.is_file():
            raise CheckpointError(
                f"cannot save step {step}: {path} is no checkpoint, and in the way: move it elsewhere"
            )
        metadata = describe(
            self._identity,
            kind,
            step=step,
            data_offset=data_offset,
            skipped_steps=skipped_steps,
            lineage=self._lineage,
        )
        commit = self._io.save(path, state, metadata=metadata)
        self._pending = self._worker.submit(self._finish, commit, step)

    def _keep(self, path: Path, state: object, kind: CheckpointKind) -> None:
        metadata = read_metadata(path)
        if changed := changed_leaves(metadata.leaves, state):
            raise CheckpointError(
                f"{path} holds another state of this step ({', '.join(changed)} differ): give another output_path, or"
                " rollback to an older step first"
            )
        self._barrier("keep")
        if kind == "permanent" and metadata.kind == "temporary" and jax.process_index() == 0:
            write_metadata(path, replace(metadata, kind="permanent"))

    def _finish(self, commit: Commit, step: int) -> None:
        log = self._folder.parent / METRICS_FILE
        try:
            if jax.process_index() == 0 and log.exists():
                fsync(log)  # A power cut that the checkpoint survives must not cost the log what came before it.
        finally:
            commit()
        if jax.process_index() != 0:
            return
        # The commit has verified `step`; so what is deleted here is always older than a sound checkpoint.
        older = [s for s in committed_steps(self._folder) if s <= step][self._policy.keep_last :]
        for path in (self._folder / step_name(s) for s in older):
            try:
                metadata = read_metadata(path)
            except (CheckpointError, CheckpointMismatchError) as error:
                logger.warning("left alone, as it cannot be told whose it is: %s", error)
                continue
            if metadata.kind == "temporary" and metadata.run_id == self._run_id:
                discard(path, self._run_id)

    def _barrier(self, name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"grug-checkpoint-{name}")
