"""The checkpoints, the record and the small files of one run in a bucket, under the right to it.

As `checkpoint.checkpointer.GrugCheckpointer` for a folder: the loop calls the same methods of both.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import final

import jax
from jax.experimental import multihost_utils

from grug_native.bucket.committing import commit_state
from grug_native.bucket.errors import StoreError
from grug_native.bucket.processes import told
from grug_native.bucket.reading import BucketCheckpoint
from grug_native.bucket.record import Record
from grug_native.bucket.run_files import changed_files, fetch_files, put_profiles
from grug_native.bucket.run_head import CheckpointEntry
from grug_native.bucket.run_writer import LEASE_SECONDS, RunWriter
from grug_native.bucket.save_queue import SaveQueue
from grug_native.bucket.saving import Upload, check_nothing_is_lost, temporary_store
from grug_native.bucket.sharded import HostState, copy_to_host
from grug_native.bucket.store import Retries, Store, check_store
from grug_native.checkpoint.leaves import changed_leaves, state_bytes
from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointKind,
    CheckpointMetadata,
    DamagedCheckpointError,
    RunIdentity,
    check_identity,
    describe,
)
from grug_native.checkpoint.orbax_io import Restored, restore_checkpoint
from grug_native.checkpoint.schedule import CheckpointPolicy, SaveSchedule, close_after
from grug_native.host.fault_injection import fault_point
from grug_native.host.run_folder import RESULTS_FILE, RunLockedError, validate_run_id
from grug_native.tracking.jsonl import METRICS_FILE

logger = logging.getLogger(__name__)


@final
class BucketCheckpointer:
    """The only object that writes to a run's folder in a bucket; every process of the run makes one.

    At most one save is written at a time. While the store is in trouble the next ones wait in the host's memory, as
    long as there is room, and the run goes on.
    """

    def __init__(
        self,
        url: str,
        files: Path,
        identity: RunIdentity,
        policy: CheckpointPolicy,
        *,
        kept: Sequence[str] = (),
        temporary_root: str | None = None,
        patience: float = 0.0,
        lease: float = LEASE_SECONDS,
        retries: Retries | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Takes the run, and fetches its small files.

        Args:
            url: Of the run's folder.
            files: The folder on this machine with the run's files.
            identity: What the run is.
            policy: When to save, and what to keep.
            kept: Files in `files` that become part of the run with each commit.
            temporary_root: URL under which temporary checkpoints go; None for the run's own folder.
            patience: Seconds for which a save is tried again while the store is in trouble.
            lease: Seconds without a sign of life after which another process may take the run.
            retries: Of single requests.
            clock: Seconds, never going back.

        Raises:
            RunLockedError: Another process owns the run.
            StoreError: The store cannot be used; says what to do.
            ValueError: `url`, `temporary_root` or the run's name is refused.
        """
        run_id = validate_run_id(identity.run_id)
        self._identity, self._policy, self._files, self._kept = identity, policy, files, tuple(kept)
        self._store = Store(url, retries=retries)
        self._temporary = (
            self._store if temporary_root is None else temporary_store(temporary_root, run_id, self._store)
        )
        self._patience = patience
        self._lineage: tuple[str, ...] = ()
        self._record: Record | None = None
        self._writer: RunWriter | None = None
        self._queued: int | None = None
        if jax.process_index() == 0:
            for store in dict.fromkeys((self._store, self._temporary)):
                check_store(store)
            temporary = None if temporary_root is None else self._temporary
            self._writer = RunWriter(self._store, run_id, temporary=temporary, lease=lease, patience=patience)
            try:
                fetch_files(self._writer, self._files, self._kept)
            except BaseException:
                self._give_up(self._writer)
                raise
        self._saves = SaveQueue()
        self._schedule = SaveSchedule(policy, clock)

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, newest first."""
        return [int(step) for step in told(None if self._writer is None else self._writer.head.steps[::-1])]

    def where(self, step: int) -> str:
        """Returns where the checkpoint of a step is."""
        head = None if self._writer is None else self._writer.head
        entry = None if head is None else next((c for c in head.checkpoints if c.step == step), None)
        return f"{self._store.url}, step {step}" if entry is None else str(BucketCheckpoint(self._store, entry))

    @property
    def saving(self) -> bool:
        """Whether a save is under way in the background, on this process."""
        return self._saves.busy

    def preflight(self, state_shape: object) -> None:
        """Checks that the state can be stored; a bucket has no end.

        Raises:
            ValueError: A leaf of the state cannot be stored.
        """
        state_bytes(state_shape)

    def due(self, step: int) -> CheckpointKind | None:
        """Returns the kind of save that the policy asks for after `step` updates, if any."""
        return self._schedule.due(step, saving=self.saving)

    def save_step_checkpoint(self, state: object, *, step: int, data_offset: int, skipped_steps: int = 0) -> None:
        """Starts to save `state` for good; returns once it is copied off the devices and may be donated.

        Raises:
            CheckpointError: Newer checkpoints are there, or another state of this step.
            ValueError: A leaf of the state cannot be stored.
            Exception: What an earlier save failed with; see `check`.
        """
        self._save(state, "permanent", step, data_offset, skipped_steps)

    def save_temporary_checkpoint(self, state: object, *, step: int, data_offset: int, skipped_steps: int = 0) -> None:
        """Starts to save `state` until newer ones are there; otherwise as `save_step_checkpoint`."""
        self._save(state, "temporary", step, data_offset, skipped_steps)

    def restore_latest_or_initialize[State](self, init: Callable[[], State], state_shape: State) -> Restored[State]:
        """Loads the newest sound checkpoint of the run, or makes a fresh state if it has never written one.

        Raises:
            CheckpointMismatchError: The checkpoint is of another run, configuration, data or model.
            NoUsableCheckpointError: There are checkpoints, all damaged.
            StoreError: The store is in trouble; nothing was set aside for it.
        """
        self.wait()
        while (entry := self._told_entry(None)) is not None:
            source = BucketCheckpoint(self._store, entry)
            try:
                restored = restore_checkpoint(source, state_shape, accept=self.accept)
            except DamagedCheckpointError as error:
                if self._writer is not None:
                    self._writer.set_aside([entry], "corrupt", str(error))
                    logger.error("CHECKPOINT DAMAGED: %s; set aside, untouched; trying the next older one", error)
                continue
            logger.info("resuming from %s", source)
            return restored
        if self._writer is not None:
            check_nothing_is_lost(self._store, self._writer.head)
        logger.info("no checkpoint in %s: starting from scratch", self._store.url)
        return Restored(init(), None)

    def restore[State](self, state_shape: State, *, step: int) -> Restored[State]:
        """Loads the checkpoint of `step`, and changes nothing; raises as for a folder."""
        self.wait()
        entry = self._told_entry(step)
        if entry is None:
            raise ValueError(f"step={step} has no checkpoint in {self._store.url}")
        return restore_checkpoint(BucketCheckpoint(self._store, entry), state_shape, accept=self.accept)

    def rollback(self, step: int) -> list[int]:
        """Makes `step` the newest checkpoint: newer ones are set aside as abandoned; returns their steps.

        Raises:
            ValueError: There is no checkpoint of `step`.
        """
        self.wait()
        steps = self.steps()
        if step != 0 and step not in steps:
            raise ValueError(f"step={step} has no checkpoint in {self._store.url}; there are {steps}")
        if self._writer is not None:
            for entry in self._writer.rollback(step):
                logger.warning("set aside, untouched: %s", BucketCheckpoint(self._store, entry))
            if step == 0:
                self._writer.swap(lambda head: head.pardoned())
            self._store.delete(RESULTS_FILE)
        self._barrier("rollback-done")
        return [s for s in steps if s > step]

    def originate(self, origin: str) -> None:
        """Says what the fresh run was made of: it heads the lineage of the checkpoints that follow."""
        self._lineage = (origin,)

    def begin(self, step: int) -> None:
        """Says that the run goes on from `step`: the record is cut back to there, and fetched to `files`."""
        if self._writer is not None:
            self._writer.cut(step)
            self._record = Record(self._writer, self._files / METRICS_FILE)

    def keep_files(self) -> None:
        """Makes the files that were written so far a part of the run."""
        if self._writer is not None and (changed := changed_files(self._writer, self._files, self._kept)):
            self._writer.record(None, changed)

    def accept(self, metadata: CheckpointMetadata) -> None:
        """Takes a checkpoint for the one to continue from: its lineage goes on in those that follow.

        Raises:
            CheckpointMismatchError: It is of another run, configuration or data.
        """
        self._lineage = check_identity(metadata, self._identity)

    def check(self) -> None:
        """Raises what a save in the background failed with, and that the run was taken; never waits."""
        if self._writer is not None:
            self._writer.check()
        self._saves.check()

    def wait(self) -> None:
        """Waits until the saves under way are committed, on every process; raises what they failed with."""
        self._saves.wait()
        self._barrier("saved")

    def close(self) -> None:
        """Waits for the saves under way, commits the end of the record, and gives the run up."""
        try:
            self._saves.close()
        except BaseException:
            if self._writer is not None:
                self._writer.patience = 0.0  # It has been used up.
            raise
        finally:
            if self._writer is not None:
                self._close(self._writer)

    def __enter__(self) -> "BucketCheckpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        close_after(error, self.close, "giving up the run")

    def _save(self, state: object, kind: CheckpointKind, step: int, data_offset: int, skipped_steps: int) -> None:
        self.check()
        if self._queued == step:
            self.wait()
        self._saves.make_room(state_bytes(state))
        self._queued = step
        self._schedule.note_save()
        newest = self._told_entry(None)
        if newest is not None and newest.step > step:
            raise CheckpointError(
                f"cannot save step {step}: {self._store.url} holds step {newest.step}; rollback({step}) first"
            )
        # One that is to stay must not be where a rule of the bucket deletes by age.
        if newest is not None and newest.step == step and (kind == "temporary" or newest.root is None):
            self.wait()
            self._keep(newest, state, kind)
            return
        store = self._temporary if kind == "temporary" else self._store
        prefix = str(told("" if self._writer is None else self._writer.new_name("checkpoints/", step)))
        fault_point("pre_save", step, process=jax.process_index())
        done = {"data_offset": data_offset, "skipped_steps": skipped_steps}
        metadata = describe(self._identity, kind, step=step, lineage=self._lineage, **done)
        copied = copy_to_host(state)
        fault_point("after_d2h", step, process=jax.process_index())
        processes = {"process": jax.process_index(), "processes": jax.process_count()}
        upload = Upload(store, prefix, patience=self._patience, **processes)
        self._saves.add(partial(self._finish, upload, copied, metadata))

    def _keep(self, entry: CheckpointEntry, state: object, kind: CheckpointKind) -> None:
        source = BucketCheckpoint(self._store, entry)
        if changed := changed_leaves(source.read_metadata().leaves, state):
            raise CheckpointError(
                f"{source} holds another state of this step ({', '.join(changed)} differ): give another output_path, or"
                " rollback to an older step first"
            )
        self._barrier("keep")
        if self._writer is not None and kind == "permanent" and entry.kind == "temporary":
            self._writer.swap(lambda head: head.with_kind(entry.step, "permanent"))

    def _finish(self, upload: Upload, state: HostState, metadata: CheckpointMetadata) -> None:
        writer, step = self._writer, metadata.step
        if writer is None:
            upload.write(state.layouts, state.blocks())
            return
        record = self._record
        commit_state(
            writer,
            upload,
            state,
            metadata,
            segment=lambda: None if record is None else record.segment(step),
            written=lambda: changed_files(writer, self._files, self._kept),
        )
        # The commit has verified `step`; so what is dropped here is always older than a sound checkpoint.
        older = [c for c in writer.head.checkpoints if c.step <= step][: -self._policy.keep_last]
        writer.retire([c for c in older if c.kind == "temporary"])

    def _close(self, writer: RunWriter) -> None:
        try:
            writer.check()
            if self._record is None:
                writer.close()
            else:
                put_profiles(writer, self._files)
                self._record.close(tuple(changed_files(writer, self._files, self._kept)))
        except BaseException:
            self._give_up(writer)
            raise

    def _give_up(self, writer: RunWriter) -> None:
        """Shows no more signs of life, whether or not the store can be told so."""
        writer.patience = 0.0
        if self._record is not None:
            self._record.stop()
        with suppress(StoreError, RunLockedError):
            writer.close()

    def _told_entry(self, step: int | None) -> CheckpointEntry | None:
        """The entry of a step, or the newest one, as process 0 knows it."""
        entries = () if self._writer is None else self._writer.head.checkpoints
        found = next((c for c in reversed(entries) if step is None or c.step == step), None)
        said = told(None if found is None else asdict(found))
        return None if said is None else CheckpointEntry(**said)

    def _barrier(self, name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"grug-checkpoint-{name}")
