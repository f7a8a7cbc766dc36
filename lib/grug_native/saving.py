"""A run's checkpoints by hand: what the loop saves and resumes from, for whoever steps through a run or comes later."""

import json
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, runtime_checkable

import jax

from grug_native.bucket.place import checkpoints_of, files_of
from grug_native.checkpoint.checkpointer import CheckpointPolicy, GrugCheckpointer
from grug_native.checkpoint.metadata import (
    CheckpointKind,
    CheckpointMetadata,
    CheckpointMismatchError,
    check_identity,
    config_differences,
)
from grug_native.checkpoint.orbax_io import Restored, load_params, restore_checkpoint
from grug_native.checkpoint.source import CheckpointSource
from grug_native.components import RunParts, load_tokenizer
from grug_native.config import COSMETIC_FIELDS
from grug_native.data.record import DATA_FILE, add_record
from grug_native.hooks import SAMPLES_FILE
from grug_native.host.run_folder import CONFIG_FILE, is_bucket, local_path
from grug_native.language_model import LanguageModel
from grug_native.parsing.named_types import encode_named
from grug_native.parsing.old_configs import upgraded
from grug_native.resume import run_identity
from grug_native.state import GrugTrainState


@runtime_checkable
class Checkpointer(Protocol):
    """What the loop asks of a run's checkpoints, be they in a folder or in a bucket; see `GrugCheckpointer`."""

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, newest first."""
        ...

    def where(self, step: int) -> str:
        """Returns where the checkpoint of a step is."""
        ...

    def originate(self, origin: str) -> None:
        """Says what a fresh run was made of, for the checkpoints that follow."""
        ...

    def begin(self, step: int) -> None:
        """Says from which step the run goes on."""
        ...

    def keep_files(self) -> None:
        """Makes the files that were written so far a part of the run."""
        ...

    def preflight(self, state_shape: object) -> None:
        """Checks that such a state can be stored."""
        ...

    def due(self, step: int) -> CheckpointKind | None:
        """Returns the kind of save that is due after `step` updates, if any."""
        ...

    def save_step_checkpoint(self, state: object, *, step: int, data_offset: int, skipped_steps: int = 0) -> None:
        """Starts to save a state for good."""
        ...

    def save_temporary_checkpoint(self, state: object, *, step: int, data_offset: int, skipped_steps: int = 0) -> None:
        """Starts to save a state until newer ones are there."""
        ...

    def restore_latest_or_initialize[State](self, init: Callable[[], State], state_shape: State) -> Restored[State]:
        """Loads the newest sound checkpoint, or makes a fresh state."""
        ...

    def restore[State](self, state_shape: State, *, step: int) -> Restored[State]:
        """Loads the checkpoint of `step`."""
        ...

    def rollback(self, step: int) -> list[int]:
        """Makes `step` the newest checkpoint; returns the steps of newer ones."""
        ...

    def accept(self, metadata: CheckpointMetadata) -> None:
        """Takes a checkpoint for the one to continue from."""
        ...

    def check(self) -> None:
        """Raises what has gone wrong in the background; never waits."""
        ...

    def wait(self) -> None:
        """Waits until what is under way is committed."""
        ...

    def __enter__(self) -> "Checkpointer": ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def record_data(parts: RunParts) -> None:
    """Keeps in the run's folder which files its data fingerprint stands for; to be called under the lock."""
    if jax.process_index() == 0:
        add_record(files_of(parts.config.output_path), parts.data_fingerprint, parts.data_record)


def open_checkpointer(parts: RunParts) -> Checkpointer:
    """The checkpointer of a run, with the right to write to its folder.

    Raises:
        RunLockedError: another process is writing to the folder.
        StoreError: the folder's bucket cannot be used.
    """
    trainer = parts.config.trainer
    policy = CheckpointPolicy(
        steps_per_checkpoint=trainer.steps_per_checkpoint,
        minutes_per_temporary_checkpoint=trainer.minutes_per_temporary_checkpoint,
        keep_last=trainer.keep_last_checkpoints,
    )
    place = parts.config.output_path
    if not is_bucket(place):
        return GrugCheckpointer(local_path(place), run_identity(parts), policy)
    from grug_native.bucket.checkpointer import BucketCheckpointer

    return BucketCheckpointer(
        place,
        files_of(place),
        run_identity(parts),
        policy,
        kept=(CONFIG_FILE, DATA_FILE, SAMPLES_FILE),
        temporary_root=trainer.temporary_root,
        patience=60 * trainer.store_patience_minutes,
        lease=trainer.store_lease_seconds,
    )


def save_state(parts: RunParts, state: GrugTrainState) -> str:
    """Saves a state for good, and waits until it is committed.

    Returns:
        Where the checkpoint is. If the run has one of this step already, that one is kept.

    Raises:
        RunLockedError: another process is writing to the run's folder.
        CheckpointMismatchError: the checkpoints in the folder are of another run, configuration or data.
        CheckpointError: the run has newer checkpoints, or the state is not finite.
    """
    step, skipped_steps = int(state.step), 0
    with jax.set_mesh(parts.mesh), open_checkpointer(parts) as checkpointer:
        for newest in checkpointer.steps()[:1]:
            metadata = checkpoints_of(parts.config.output_path).find(newest).read_metadata()
            checkpointer.accept(metadata)
            skipped_steps = metadata.skipped_steps
        if not checkpointer.steps() and parts.origin is not None:
            checkpointer.originate(parts.origin.in_words)
        record_data(parts)
        checkpointer.keep_files()
        data_offset = parts.config.trainer.data_offset(step)
        checkpointer.save_step_checkpoint(state, step=step, data_offset=data_offset, skipped_steps=skipped_steps)
        checkpointer.wait()
        return checkpointer.where(step)


def restore_state(parts: RunParts, step: int | None = None) -> GrugTrainState:
    """Loads a state; changes nothing on disk, and needs no lock.

    Args:
        parts: of the run.
        step: which checkpoint; None takes the newest.

    Raises:
        ValueError: the run has no such checkpoint.
        CheckpointMismatchError: it is of another run, configuration, data or model.
        DamagedCheckpointError: it cannot be read, or is not what was saved.
    """
    identity = run_identity(parts)
    source = checkpoints_of(parts.config.output_path).find(step)

    def accept(metadata: CheckpointMetadata) -> None:
        check_identity(metadata, identity)

    with jax.set_mesh(parts.mesh):
        return restore_checkpoint(source, parts.state_shape, accept=accept).state


def load_parameters(parts: RunParts, step: int | None = None, *, ema: bool = False) -> tuple[int, LanguageModel]:
    """Loads the parameters alone, for use and not for training; raises as `readable_checkpoint`.

    Args:
        parts: of the run.
        step: which checkpoint; None takes the newest.
        ema: take the moving average.

    Returns:
        The updates behind the parameters, and the parameters on the run's mesh.

    """
    path, metadata = readable_checkpoint(parts, step, ema=ema)
    with jax.set_mesh(parts.mesh):
        return metadata.step, load_params(path, parts.state_shape.params, ema=ema)


def readable_checkpoint(
    parts: RunParts, step: int | None = None, *, ema: bool = False
) -> tuple[CheckpointSource, CheckpointMetadata]:
    """Finds a checkpoint whose parameters are those of the run's model, to be read; the data are not opened.

    Raises:
        ValueError: the run has no such checkpoint, or keeps no moving average.
        CheckpointMismatchError: it is of another model, or of another tokenizer.
        DamagedCheckpointError: it cannot be read, or is not what was saved.
    """
    from grug_native.data.vocabulary import tokenizer_digest

    if ema and parts.config.trainer.ema_beta is None:
        raise ValueError("the run keeps no moving average (trainer.ema_beta is null): take its parameters instead")
    path = checkpoints_of(parts.config.output_path).find(step)
    metadata = path.read_metadata()
    wanted = {"model": json.loads(json.dumps(encode_named("model", parts.config.model)))}
    if changed := config_differences({"model": upgraded(metadata.config)["model"]}, wanted):
        changed = [d for d in changed if d.name not in COSMETIC_FIELDS]
        if changed:
            raise CheckpointMismatchError(f"{path} is of another model:", changed)
    load_tokenizer(parts.config.data)
    if metadata.tokenizer_digest != tokenizer_digest(parts.config.data):
        raise CheckpointMismatchError(
            f"data.tokenizer={parts.config.data.tokenizer!r} is not the tokenizer that {path} was trained with, and "
            "its ids mean other tokens: give that one"
        )
    return path, metadata
