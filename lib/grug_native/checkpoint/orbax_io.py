"""Writing one checkpoint with Orbax so that it is either wholly there or not at all, and reading it back, proven.

A save goes: digest on the device; Orbax copies to the host (only that blocks the loop) and writes into a hidden
folder; the files are synced to the disk, read back from there and compared with the digests; our metadata is added; and
one rename makes it `step-N`. So a folder of that name is complete and has been verified, whenever the process is
killed.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from grug_native.checkpoint.digest import item_of, verify_files
from grug_native.checkpoint.leaves import (
    check_leaves,
    finish_digests,
    leaf_records,
    named_leaves,
    prove_leaves,
    start_digests,
    stored_arrays,
    with_leaves,
)
from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointMetadata,
    DamagedCheckpointError,
    no_usable_checkpoint,
    write_metadata,
)
from grug_native.checkpoint.source import CheckpointSource, FolderCheckpoint
from grug_native.host.fault_injection import fault_point
from grug_native.host.run_folder import (
    committed_steps,
    fsync,
    quarantined,
    saving_name,
    set_aside,
    settle_tree,
    step_name,
    sweep_leftovers,
)

logger = logging.getLogger(__name__)

Accept = Callable[[CheckpointMetadata], object]
"""Raises if a sound checkpoint is not one to continue from."""

Commit = Callable[[], None]
"""Finishes a save: waits for the write, verifies it, makes it visible. To be called once, from any thread."""


_SHARED = "the run's folder must be on a disk that all processes share, or in a bucket"


class NonFiniteStateError(CheckpointError):
    """The parameters hold a NaN or an infinity; they were not committed."""


@dataclass(frozen=True)
class Restored[State]:
    """A state, and what its checkpoint said."""

    state: State
    """On the devices, digests proven."""
    metadata: CheckpointMetadata | None
    """None if the state is a fresh one."""


@runtime_checkable
class CheckpointIO(Protocol):
    """How a whole train state gets onto a disk and back."""

    def save(self, path: Path, state: object, *, metadata: CheckpointMetadata) -> Commit:
        """Starts to write `state`, which becomes `path` when the returned function is called and returns.

        The caller may donate or change `state` as soon as this returns.
        """
        ...

    def restore_latest[State](
        self, base_path: Path, state_shape: State, *, accept: Accept = ...
    ) -> Restored[State] | None:
        """Loads the newest sound checkpoint under `base_path`, if there is any, into the layout of `state_shape`."""
        ...


@dataclass(frozen=True)
class OrbaxCheckpointIO:
    """`CheckpointIO` with Orbax's OCDBT and Zarr files. Every process of the run calls every method."""

    compress: bool = False
    """Zstandard: saves about a tenth of the disk on float32 weights, and costs four times the processor time."""

    def save(self, path: Path, state: object, *, metadata: CheckpointMetadata) -> Commit:
        """Starts to write `state`; the returned function commits it as `path`.

        Raises:
            ValueError: A leaf of the state cannot be stored.
        """
        from orbax.checkpoint import v1 as ocp

        process = jax.process_index()
        fault_point("pre_save", metadata.step, process=process)
        leaves = named_leaves(state)
        stored = stored_arrays(leaves)
        digests = start_digests(stored)
        items: dict[str, dict[str, jax.Array]] = {}
        for name, array in stored.items():
            item, key = item_of(name)
            items.setdefault(item, {})[key] = array
        hidden = path.with_name(saving_name(metadata.run_id, metadata.step))
        context = ocp.Context()
        context.array.saving.use_compression = self.compress
        with context:
            response = ocp.save_checkpointables_async(str(hidden), items)
        fault_point("after_d2h", metadata.step, process=process)
        records = leaf_records(leaves)

        def commit() -> None:
            try:
                try:
                    fault_point("mid_write", metadata.step, process=process)
                finally:
                    # Even after a failure: nobody may write there once we clean up.
                    _wait_for_write(response.result, path)
                texts, not_finite = finish_digests(digests)
                if poisoned := [name for name in not_finite if name.startswith(("params.", "ema_params."))]:
                    raise NonFiniteStateError(f"step {metadata.step} is not saved: {', '.join(poisoned)} is not finite")
                if process == 0:
                    complete = replace(metadata, leaves={n: replace(r, digest=texts[n]) for n, r in records.items()})
                    _publish(hidden, path, complete)
            except BaseException as error:
                if process == 0:
                    _clean_up(path.parent, metadata.run_id, error)
                raise

        return commit

    def restore_latest[State](
        self, base_path: Path, state_shape: State, *, accept: Accept = lambda _: None
    ) -> Restored[State] | None:
        """Loads the newest sound checkpoint in the folder `base_path`; damaged ones are renamed `.corrupt-step-N`.

        Returns:
            None if there is no checkpoint, damaged or not.

        Raises:
            CheckpointMismatchError: The newest sound one is not of this shape, or `accept` refused it.
            NoUsableCheckpointError: All are damaged.
            CheckpointError: Process 0 can read one, and another process cannot.
        """
        steps = _steps_of_process_0(base_path)
        for step in steps:
            path = base_path / step_name(step)
            try:
                return restore_checkpoint(path, state_shape, accept=accept)
            except DamagedCheckpointError as error:
                if jax.process_index() == 0:
                    aside = set_aside(path, "corrupt")
                    logger.error("CHECKPOINT DAMAGED: %s; moved to %s; trying the next older one", error, aside)
        if (remains := quarantined(base_path)) or steps:
            raise no_usable_checkpoint(base_path, [path.name for path in remains])
        return None


def restore_checkpoint[State](
    at: Path | CheckpointSource, state_shape: State, *, accept: Accept = lambda _: None
) -> Restored[State]:
    """Loads a checkpoint.

    Args:
        at: A committed `step-N` folder, or another source.
        state_shape: The wanted state, its arrays abstract and carrying the wanted shardings; any mesh will do.
        accept: Looks at the metadata before anything is loaded.

    Raises:
        CheckpointMismatchError: It is sound, and not of this shape.
        DamagedCheckpointError: It cannot be read, or is not what was saved; of several processes, all raise it.
        CheckpointError: Process 0 can read it, and another process cannot.
    """
    path = FolderCheckpoint(at) if isinstance(at, Path) else at
    try:
        metadata = path.read_metadata()
        accept(metadata)
        wanted = named_leaves(state_shape)
        check_leaves(metadata.leaves, leaf_records(wanted))
        loaded = path.load(metadata.leaves, wanted)
    except DamagedCheckpointError as error:
        if _readers(False)[0]:
            raise CheckpointError(f"process 0 can read {path}, and this one cannot; {_SHARED}: {error}") from error
        raise
    except BaseException:
        _readers(False)
        raise
    # What follows is done by all processes together, so all must have come this far.
    readers = _readers(True)
    if not readers[0]:
        raise DamagedCheckpointError(f"process 0 cannot read {path}")
    if not all(readers):
        raise CheckpointError(f"process {readers.index(False)} cannot read {path}, and process 0 can; {_SHARED}")
    return Restored(with_leaves(state_shape, _prove(path, metadata, loaded)), metadata)


def load_params[Params](at: Path | CheckpointSource, params_shape: Params, *, ema: bool = False) -> Params:
    """Loads the parameters alone from a checkpoint, for evaluation.

    Args:
        at: A committed `step-N` folder, or another source.
        params_shape: The wanted parameters, abstract, with shardings if they matter.
        ema: Take the moving average instead.

    Raises:
        CheckpointMismatchError: The checkpoint's parameters are of another shape, or it has no moving average.
        DamagedCheckpointError: They cannot be read, or are not what was saved.
    """
    field = "ema_params" if ema else "params"
    path = FolderCheckpoint(at) if isinstance(at, Path) else at
    metadata = path.read_metadata()
    wanted = named_leaves({field: params_shape})
    check_leaves({n: r for n, r in metadata.leaves.items() if n.startswith(f"{field}.")}, leaf_records(wanted))
    loaded = path.load(metadata.leaves, wanted)
    return with_leaves({field: params_shape}, _prove(path, metadata, loaded))[field]


def _prove(
    path: CheckpointSource, metadata: CheckpointMetadata, loaded: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    try:
        return prove_leaves(loaded, metadata.leaves)
    except DamagedCheckpointError as error:
        if not path.verify(metadata):
            raise CheckpointError(
                f"{path} is sound on disk, and yet not once on the devices: {error}. It stays there: try again, and"
                " mistrust this machine's memory"
            ) from error
        raise


def _wait_for_write(result: Callable[[], object], path: Path) -> None:
    try:
        result()
    except Exception as error:  # TensorStore raises a ValueError for a full disk, and it is no mistake in a config
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(path.parent).free
    return CheckpointError(f"{path} could not be written; its disk has {free} bytes free: {error}")


def _clean_up(folder: Path, run_id: str, error: BaseException) -> None:
    try:
        sweep_leftovers(folder, run_id)
    except OSError as late:  # threads of Orbax may still write there; the next start of the run cleans up
        error.add_note(f"what was written of it is still there: {late!r}")


def _publish(hidden: Path, path: Path, metadata: CheckpointMetadata) -> None:
    try:
        settle_tree(hidden)
        problems = verify_files(hidden, metadata)
        if problems:
            raise DamagedCheckpointError("the disk does not give back what was written: " + "; ".join(problems))
        write_metadata(hidden, metadata)
        fault_point("pre_commit", metadata.step)
        hidden.rename(path)
        fsync(path.parent)
    except OSError as error:
        raise _unwritten(path, error) from error
    fault_point("post_commit", metadata.step)


def _steps_of_process_0(folder: Path) -> list[int]:
    steps = committed_steps(folder)
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array([*steps, 0], np.int32), count)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tolist()


def _readers(ok: bool) -> list[bool]:
    """Whether each process could read a checkpoint, told to all; the one place where they meet before its arrays."""
    if jax.process_count() == 1:
        return [ok]
    return np.asarray(multihost_utils.process_allgather(np.array(ok))).tolist()
