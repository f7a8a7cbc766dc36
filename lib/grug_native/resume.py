"""Whether a run may go on from a checkpoint, and as what: the same checks for its plan and for itself."""

import logging
from dataclasses import replace

from grug_native.bucket.place import checkpoints_of, fetched, recorded_config
from grug_native.checkpoint.leaves import check_leaves, leaf_records, named_leaves
from grug_native.checkpoint.metadata import (
    CheckpointMetadata,
    CheckpointMismatchError,
    DamagedCheckpointError,
    RunIdentity,
    check_identity,
    no_usable_checkpoint,
)
from grug_native.checkpoint.source import Checkpoints
from grug_native.components import RunParts
from grug_native.config import COSMETIC_FIELDS, GrugNativeRunConfig, GrugTrainerConfig, config_to_dict
from grug_native.data.record import DATA_FILE, read_records
from grug_native.host.run_folder import step_name
from grug_native.weights.config import InitFrom

logger = logging.getLogger(__name__)


def run_identity(parts: RunParts) -> RunIdentity:
    """What the run is, as far as resuming it is concerned; opens the data."""
    from grug_native.data.vocabulary import tokenizer_digest

    config = parts.config
    return RunIdentity(
        run_id=config.run_id,
        config=config_to_dict(config),
        data_fingerprint=parts.data_fingerprint,
        tokenizer_digest=tokenizer_digest(config.data),
        mesh=dict(parts.mesh.shape),
        cosmetic=COSMETIC_FIELDS,
        allowed_changes=config.trainer.allow_changes,
        data=parts.data_record,
        known_data=read_records(fetched(config.output_path, [DATA_FILE])),
    )


def check_resume(parts: RunParts) -> int | None:
    """Finds what the run would go on from, and checks it as far as that is possible without reading an array.

    Opens the data, if the run has a checkpoint; and makes none.

    Returns:
        The step; None for a fresh start.

    Raises:
        CheckpointMismatchError: the newest checkpoint is of another run, configuration, data or model.
        NoUsableCheckpointError: there are checkpoints, all damaged.
    """
    metadata = _newest(checkpoints_of(parts.config.output_path))
    if metadata is None:
        return None
    check_identity(metadata, _identity_so_far(parts, metadata))
    check_leaves(metadata.leaves, leaf_records(named_leaves(parts.state_shape)))
    check_data_offset(parts.config.trainer, metadata)
    return metadata.step


def check_steps(config: GrugNativeRunConfig, *, stop_after: int | None, resume_step: int | None) -> None:
    """Checks where a start of the run is to begin and to stop.

    Raises:
        ValueError: if it would stop before the start of the run, or there is no checkpoint to go back to.
    """
    if stop_after is not None and stop_after < 0:
        raise ValueError(f"stop_after={stop_after} must not be negative: it counts steps from the start of the run")
    if resume_step:
        checkpoints_of(config.output_path).find(resume_step)


def _newest(checkpoints: Checkpoints) -> CheckpointMetadata | None:
    steps = checkpoints.steps()
    for checkpoint in checkpoints.every():
        try:
            return checkpoint.read_metadata()
        except DamagedCheckpointError as error:
            logger.error("CHECKPOINT DAMAGED: %s; trying the next older one", error)
    if remains := [*map(step_name, steps), *checkpoints.damaged()]:
        raise no_usable_checkpoint(checkpoints, remains)
    return None


def _identity_so_far(parts: RunParts, metadata: CheckpointMetadata) -> RunIdentity:
    """As `run_identity`; where the token caches have yet to be made, the data pass for those of the checkpoint."""
    from grug_native.data.cache import unmade_caches
    from grug_native.data.vocabulary import tokenizer_digest

    if not (unmade := unmade_caches(parts.config.data)):
        return run_identity(parts)
    logger.warning("whether the data are those of the checkpoint will be known once their caches are made: %s", unmade)
    config = parts.config
    return RunIdentity(
        run_id=config.run_id,
        config=config_to_dict(config),
        data_fingerprint=metadata.data_fingerprint,
        tokenizer_digest=tokenizer_digest(config.data),
        mesh=dict(parts.mesh.shape),
        cosmetic=COSMETIC_FIELDS,
        allowed_changes=config.trainer.allow_changes,
    )


def as_begun(parts: RunParts, *, fresh: bool) -> GrugNativeRunConfig:
    """The config to be kept in a run's folder: with what its first parameters were, whatever this start says.

    Args:
        parts: of the run.
        fresh: whether it begins now; else what was kept then stays.
    """
    config, begun = parts.config, parts.origin
    if not fresh:
        kept = recorded_config(config.output_path)
        raw = None if kept is None else kept["trainer"].get("init_from")
        begun = None if raw is None else InitFrom(**raw)
    return replace(config, trainer=replace(config.trainer, init_from=begun))


def check_data_offset(trainer: GrugTrainerConfig, metadata: CheckpointMetadata) -> None:
    """Checks that the batch after a checkpoint is the next one.

    Raises:
        CheckpointMismatchError: the batch sizes before it were others.
    """
    step, offset, wanted = metadata.step, metadata.data_offset, trainer.data_offset(metadata.step)
    if offset != wanted:
        raise CheckpointMismatchError(
            f"step {step} was saved after {offset} sequences, and with trainer.train_batch_size="
            f"{trainer.train_batch_size} it would come after {wanted}, so that the next batch would not be the next: "
            f"give the change as a schedule that begins at step {step}, ((0, ...), ({step}, ...))"
        )
