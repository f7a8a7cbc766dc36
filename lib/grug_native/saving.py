"""A run's checkpoints by hand: what the loop saves and resumes from, for whoever steps through a run or comes later."""

from pathlib import Path

import jax

from grug_native.checkpoint.checkpointer import CheckpointPolicy, GrugCheckpointer
from grug_native.checkpoint.metadata import (
    CheckpointMetadata,
    CheckpointMismatchError,
    check_identity,
    config_differences,
    read_metadata,
)
from grug_native.checkpoint.orbax_io import load_params, restore_checkpoint
from grug_native.components import RunParts, load_tokenizer
from grug_native.config import COSMETIC_FIELDS, config_to_dict
from grug_native.data.record import add_record
from grug_native.host.run_folder import committed_steps, find_checkpoint, local_path, step_name
from grug_native.language_model import LanguageModel
from grug_native.resume import checkpoints_folder, run_identity
from grug_native.state import GrugTrainState


def record_data(parts: RunParts) -> None:
    """Keeps in the run's folder which files its data fingerprint stands for; to be called under the lock."""
    if jax.process_index() == 0:
        add_record(local_path(parts.config.output_path), parts.data_fingerprint, parts.data_record)


def open_checkpointer(parts: RunParts) -> GrugCheckpointer:
    """The checkpointer of a run, with the lock of its folder.

    Raises:
        RunLockedError: another process is writing to the folder.
    """
    trainer = parts.config.trainer
    policy = CheckpointPolicy(
        steps_per_checkpoint=trainer.steps_per_checkpoint,
        minutes_per_temporary_checkpoint=trainer.minutes_per_temporary_checkpoint,
        keep_last=trainer.keep_last_checkpoints,
    )
    return GrugCheckpointer(local_path(parts.config.output_path), run_identity(parts), policy)


def save_state(parts: RunParts, state: GrugTrainState) -> Path:
    """Saves a state for good, and waits until it is committed.

    Returns:
        The checkpoint's folder. If the run has one of this step already, that one is kept.

    Raises:
        RunLockedError: another process is writing to the run's folder.
        CheckpointMismatchError: the checkpoints in the folder are of another run, configuration or data.
        CheckpointError: the run has newer checkpoints, or the state is not finite.
    """
    step, skipped_steps = int(state.step), 0
    with jax.set_mesh(parts.mesh), open_checkpointer(parts) as checkpointer:
        path = checkpointer.folder / step_name(step)
        for newest in committed_steps(checkpointer.folder)[:1]:
            metadata = read_metadata(checkpointer.folder / step_name(newest))
            checkpointer.accept(metadata)
            skipped_steps = metadata.skipped_steps
        record_data(parts)
        data_offset = parts.config.trainer.data_offset(step)
        checkpointer.save_step_checkpoint(state, step=step, data_offset=data_offset, skipped_steps=skipped_steps)
    return path


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
    path = find_checkpoint(checkpoints_folder(parts), step)

    def accept(metadata: CheckpointMetadata) -> None:
        check_identity(metadata, identity)

    with jax.set_mesh(parts.mesh):
        return restore_checkpoint(path, parts.state_shape, accept=accept).state


def load_parameters(parts: RunParts, step: int | None = None, *, ema: bool = False) -> tuple[int, LanguageModel]:
    """Loads the parameters alone, for use and not for training; the data are not opened.

    Args:
        parts: of the run.
        step: which checkpoint; None takes the newest.
        ema: take the moving average.

    Returns:
        The updates behind the parameters, and the parameters on the run's mesh.

    Raises:
        ValueError: the run has no such checkpoint, or keeps no moving average.
        CheckpointMismatchError: it is of another model, or of another tokenizer.
        DamagedCheckpointError: it cannot be read, or is not what was saved.
    """
    from grug_native.data.cache import tokenizer_digest

    if ema and parts.config.trainer.ema_beta is None:
        raise ValueError("the run keeps no moving average (trainer.ema_beta is null): take its parameters instead")
    path = find_checkpoint(checkpoints_folder(parts), step)
    metadata = read_metadata(path)
    wanted = {"model": config_to_dict(parts.config)["model"]}
    if changed := config_differences({"model": metadata.config["model"]}, wanted):
        changed = [d for d in changed if d.name not in COSMETIC_FIELDS]
        if changed:
            raise CheckpointMismatchError(f"{path} is of another model:", changed)
    load_tokenizer(parts.config.data)
    if metadata.tokenizer_digest != tokenizer_digest(parts.config.data):
        raise CheckpointMismatchError(
            f"data.tokenizer={parts.config.data.tokenizer!r} is not the tokenizer that {path} was trained with, and "
            "its ids mean other tokens: give that one"
        )
    with jax.set_mesh(parts.mesh):
        return metadata.step, load_params(path, parts.state_shape.params, ema=ema)
