"""From a copied state to a committed checkpoint, on the process that owns the run."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from grug_native.bucket.run_head import Segment, SmallFile
from grug_native.bucket.run_writer import RunWriter
from grug_native.bucket.saving import Upload, commit_upload
from grug_native.bucket.sharded import HostState
from grug_native.checkpoint.metadata import CheckpointMetadata, encode_metadata
from grug_native.checkpoint.orbax_io import NonFiniteStateError
from grug_native.host.fault_injection import fault_point


def commit_state(
    writer: RunWriter,
    upload: Upload,
    state: HostState,
    metadata: CheckpointMetadata,
    *,
    segment: Callable[[], Segment | None],
    written: Callable[[], Sequence[SmallFile]],
) -> None:
    """Writes and proves a state, and commits it with what the run said until then; or leaves nothing of it.

    Args:
        writer: Of the run.
        upload: Of this attempt, nothing written yet.
        state: On the host.
        metadata: Of the checkpoint, but for its leaves.
        segment: Writes the record of the steps before it that is not committed.
        written: Writes the files that have changed.

    Raises:
        NonFiniteStateError: The parameters hold a NaN or an infinity.
        DamagedCheckpointError: The store does not give back what was written.
        FencedError: Another process has taken the run.
        StoreError: The store is in trouble, and has been for as long as the patience lasts.
    """
    step = metadata.step
    try:
        records, not_finite = state.records()
        if poisoned := [name for name in not_finite if name.startswith(("params.", "ema_params."))]:
            raise NonFiniteStateError(f"step {step} is not saved: {', '.join(poisoned)} is not finite")
        text = encode_metadata(replace(metadata, leaves=records)).encode()
        sums = upload.write(state.layouts, state.blocks())
        fault_point("mid_write", step)
        sha256 = upload.finish(sums, records, lambda: text)
        fault_point("pre_commit", step)
        commit_upload(writer, upload, sha256, step=step, kind=metadata.kind, segment=segment, written=written())
    except BaseException:
        writer.give_up(upload.store, upload.prefix)
        raise
    fault_point("post_commit", step)
