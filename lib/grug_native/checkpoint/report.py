"""What `grug ckpt` answers: which checkpoints a run has, whether they hold what was saved, and how two differ.

No device and no Orbax is needed; values are read only where the metadata cannot tell.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.table import Column, Table

from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointMetadata,
    CheckpointMismatchError,
    Difference,
    config_differences,
    leaf_differences,
    read_metadata,
)
from grug_native.checkpoint.source import CheckpointSource, FolderCheckpoint
from grug_native.host.run_folder import committed_steps, quarantined, step_name


@dataclass(frozen=True)
class CheckpointEntry:
    """One folder among a run's checkpoints."""

    path: Path
    """The folder; of a checkpoint in a bucket, what it would be called."""
    disk_bytes: int
    """The size of its files; in a bucket, of its arrays."""
    metadata: CheckpointMetadata | None
    """None if it cannot be read."""
    problem: str | None
    """Why it is of no use, if that is known without reading arrays."""


@dataclass(frozen=True)
class CheckpointDiff:
    """How checkpoint `b` differs from checkpoint `a`, with a's values as stored and b's as wanted."""

    fields: tuple[Difference, ...]
    """Steps, data position and configuration."""
    structure: tuple[Difference, ...]
    """Leaves present in one only, or of another shape or type."""
    values: dict[str, float]
    """Largest absolute difference of each comparable leaf whose digest differs; NaN if not asked for."""
    equal_leaves: int
    """Leaves with equal digests."""


def list_checkpoints(folder: Path) -> list[CheckpointEntry]:
    """Returns the checkpoints in a run's `checkpoints/` folder, newest first, then those set aside as damaged.

    The run may go on meanwhile: what it deletes on the way is left out.
    """
    paths = [folder / step_name(step) for step in committed_steps(folder)]
    entries = [_entry(path) for path in [*paths, *quarantined(folder), *sorted(folder.glob(".abandoned-*"))]]
    return [entry for entry in entries if entry is not None]


def _entry(path: Path) -> CheckpointEntry | None:
    """What there is to say of a checkpoint; None if it is no longer there."""
    try:
        size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    except FileNotFoundError:
        return None  # What is committed is never written to, so all of it is going.
    try:
        metadata = read_metadata(path)
    except (CheckpointError, CheckpointMismatchError) as error:
        return CheckpointEntry(path, size, None, str(error)) if path.exists() else None
    aside = path.name.removeprefix(".").split("-")[0] if path.name.startswith(".") else None
    return CheckpointEntry(path, size, metadata, aside)


def verify_checkpoint(at: Path | CheckpointSource) -> list[str]:
    """Reads everything in a checkpoint, an array at a time; returns what is wrong, nothing if it is sound."""
    source = _source(at)
    try:
        metadata = source.read_metadata()
    except (CheckpointError, CheckpointMismatchError) as error:
        return [str(error)]
    return source.verify(metadata)


def diff_checkpoints(a: Path | CheckpointSource, b: Path | CheckpointSource, *, values: bool = False) -> CheckpointDiff:
    """Compares two checkpoints.

    Args:
        a: A step folder, or another source.
        b: Another, of any run.
        values: Read and verify the arrays whose digests differ, to say by how much.

    Raises:
        CheckpointError: One of them cannot be read.
    """
    one, other = _source(a), _source(b)
    first, second = one.read_metadata(), other.read_metadata()
    names = ("run_id", "step", "kind", "data_offset", "data_fingerprint", "tokenizer_digest", "mesh", "versions")
    fields = config_differences({n: getattr(first, n) for n in names}, {n: getattr(second, n) for n in names})
    fields += config_differences({"config": first.config}, {"config": second.config})
    structure = leaf_differences(first.leaves, second.leaves)
    shared = first.leaves.keys() & second.leaves.keys() - {d.name for d in structure}
    changed = [n for n in first.leaves if n in shared and first.leaves[n].digest != second.leaves[n].digest]
    gaps = _largest_gaps(one, other, changed) if values else dict.fromkeys(changed, math.nan)
    return CheckpointDiff(tuple(fields), tuple(structure), gaps, len(shared) - len(changed))


def _source(at: Path | CheckpointSource) -> CheckpointSource:
    return FolderCheckpoint(at) if isinstance(at, Path) else at


def _largest_gaps(a: CheckpointSource, b: CheckpointSource, names: list[str]) -> dict[str, float]:
    gaps: dict[str, float] = {}
    for name in names:  # one pair of arrays at a time
        one, two = (source.read_leaf(name).astype(np.float64) for source in (a, b))
        gaps[name] = float(np.max(np.abs(one - two)))
    return gaps


def checkpoints_table(entries: list[CheckpointEntry]) -> Table:
    """Returns a table of checkpoints for a terminal."""
    saved = Column("saved (UTC)", no_wrap=True)
    table = Table("checkpoint", "kind", "sequences", saved, "MB", _whole("state"))
    for entry in entries:
        data = entry.metadata
        known = (data.kind, f"{data.data_offset:,}", _short_time(data.saved_at)) if data else ("?", "?", "?")
        table.add_row(entry.path.name, *known, f"{entry.disk_bytes / 1e6:,.1f}", entry.problem or "committed")
    return table


def _whole(header: str) -> Column:
    """A column whose texts are folded, and never cut short, in a narrow terminal."""
    return Column(header, overflow="fold")


def _short_time(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")


def metadata_table(metadata: CheckpointMetadata) -> Table:
    """Returns a table of everything a checkpoint says about itself, leaf by leaf."""
    table = Table(_whole("field"), _whole("value"), title=f"{metadata.run_id} step {metadata.step}")
    for item in fields(metadata):
        value = getattr(metadata, item.name)
        if item.name not in ("run_id", "step", "config", "lineage", "leaves"):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
            table.add_row(item.name, text)
    for line in metadata.lineage:
        table.add_row("lineage", line)
    table.add_section()
    for name, record in metadata.leaves.items():
        table.add_row(name, f"{record}  {record.digest}")
    return table


def diff_table(diff: CheckpointDiff) -> Table:
    """Returns a table of how two checkpoints differ."""
    table = Table(_whole("what"), _whole("a"), _whole("b"), caption=f"leaves that are equal: {diff.equal_leaves}")
    for difference in (*diff.fields, *diff.structure):
        table.add_row(difference.name, difference.stored or "-", difference.wanted or "-")
    table.add_section()
    for name, gap in diff.values.items():
        table.add_row(name, "digest differs", "" if math.isnan(gap) else f"max |a - b| = {gap:.3g}")
    return table
