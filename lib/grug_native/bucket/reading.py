"""A run in a bucket as a reader sees it: one look at `run.json`, and what it names. No right to it is needed."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final, override

import numpy as np

from grug_native.bucket.arrays import BucketReader, read_verified
from grug_native.bucket.record import DamagedRecordError
from grug_native.bucket.run_head import CheckpointEntry, RunHead, digest
from grug_native.bucket.run_writer import read_head
from grug_native.bucket.saving import entry_store, read_metadata_object
from grug_native.bucket.store import Store
from grug_native.checkpoint import report
from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointMetadata,
    CheckpointMismatchError,
    DamagedCheckpointError,
    LeafRecord,
    decode_metadata,
)
from grug_native.host.run_folder import step_name

if TYPE_CHECKING:
    import jax

    from grug_native.checkpoint.leaves import Leaf


@final
class BucketCheckpoint:
    """A checkpoint of a run in a bucket."""

    def __init__(self, run: Store, entry: CheckpointEntry):
        self._run, self._entry = run, entry

    @override
    def __str__(self) -> str:
        return f"{self._entry.root or self._run.url}/{self._entry.prefix.rstrip('/')}"

    @property
    def name(self) -> str:
        """`step-N`."""
        return step_name(self._entry.step)

    def exists(self) -> bool:
        """Whether the run still names it."""
        head = read_head(self._run)
        return head is not None and self._entry.prefix in head.names()

    def read_metadata(self) -> CheckpointMetadata:
        """Reads what it says about itself.

        Raises:
            DamagedCheckpointError: It is missing, or not what was written.
            CheckpointError: Its run has retired it meanwhile.
            StoreError: The store is in trouble.
        """
        try:
            data = read_metadata_object(self._run, self._entry)
            metadata = decode_metadata(data, str(self))
            if metadata.step != self._entry.step:
                raise DamagedCheckpointError(f"{self} holds step {metadata.step}, and not {self._entry.step}")
        except DamagedCheckpointError as error:
            raise self._seen(error) from error
        return replace(metadata, kind=self._entry.kind)

    def read_leaf(self, leaf: str) -> np.ndarray:
        """Reads an array, and verifies it."""
        return read_verified(self._reader, leaf, self.read_metadata().leaves[leaf])

    def verify(self, metadata: CheckpointMetadata) -> list[str]:
        """Reads every array; returns what is wrong."""
        problems: list[str] = []
        for leaf, record in metadata.leaves.items():
            try:
                read_verified(self._reader, leaf, record)
            except DamagedCheckpointError as error:
                problems.append(f"step {metadata.step}: {error}")
        return problems

    def load(self, stored: Mapping[str, LeafRecord], wanted: "Mapping[str, Leaf]") -> "dict[str, jax.Array]":
        """Loads arrays onto devices."""
        from grug_native.bucket.sharded import load_arrays

        try:
            return load_arrays(self._reader, stored, wanted)
        except DamagedCheckpointError as error:
            raise self._seen(error) from error

    @cached_property
    def _reader(self) -> BucketReader:
        return BucketReader(entry_store(self._run, self._entry), self._entry.prefix)

    def _seen(self, error: DamagedCheckpointError) -> CheckpointError:
        """The error, as damage only if the checkpoint has not been retired under the reader's hands."""
        if self.exists():
            return error
        return CheckpointError(f"{self} was retired by its run meanwhile: try again, with a newer one")


@final
class BucketCheckpoints:
    """The checkpoints of a run in a bucket, as they were at the first look."""

    def __init__(self, run: Store):
        self._run = run

    @cached_property
    def _head(self) -> RunHead | None:
        return read_head(self._run)

    @override
    def __str__(self) -> str:
        return self._run.url

    def steps(self) -> list[int]:
        """Returns the steps of the committed ones, newest first."""
        return [] if self._head is None else self._head.steps[::-1]

    def every(self) -> list[BucketCheckpoint]:
        """Returns the committed ones, newest first."""
        return [BucketCheckpoint(self._run, c) for c in reversed(() if self._head is None else self._head.checkpoints)]

    def find(self, step: int | None) -> BucketCheckpoint:
        """Returns the one of `step`, the newest for None; a ValueError if there is none."""
        steps = self.steps()
        if self._head is None or not steps:
            raise ValueError(
                f"{self._run.url} holds no checkpoint: train the run first, or give the URL of one that has (a bucket"
                " that is not there looks empty, too)"
            )
        if step is not None and step not in steps:
            raise ValueError(f"{self._run.url} holds no checkpoint of step {step}: there are {steps}")
        wanted = steps[0] if step is None else step
        return BucketCheckpoint(self._run, next(c for c in self._head.checkpoints if c.step == wanted))

    def damaged(self) -> list[str]:
        """Returns the prefixes of those that were set aside as damaged."""
        aside = () if self._head is None else self._head.set_aside
        return [one.entry.prefix for one in aside if one.label == "corrupt"]

    def listed(self) -> list[report.CheckpointEntry]:
        """Returns all of them for a table, newest first, then those that were set aside."""
        if self._head is None:
            return []
        entries = [self._listed(entry, None) for entry in reversed(self._head.checkpoints)]
        return entries + [self._listed(aside.entry, aside.label) for aside in self._head.set_aside]

    def _listed(self, entry: CheckpointEntry, label: str | None) -> report.CheckpointEntry:
        path = Path(step_name(entry.step) if label is None else f".{label}-{step_name(entry.step)}")
        try:
            metadata = BucketCheckpoint(self._run, entry).read_metadata()
        except (CheckpointError, CheckpointMismatchError) as error:
            return report.CheckpointEntry(path, 0, None, str(error))
        size = sum(math.prod(r.shape) * np.dtype(r.dtype).itemsize for r in metadata.leaves.values())
        return report.CheckpointEntry(path, size, metadata, label)


def small_file(run: Store, head: RunHead | None, path: str) -> bytes | None:
    """Returns a file of a run, by what it is called there: one that `run.json` names, proven, or else a plain object.

    Raises:
        DamagedRecordError: It is named, and missing or not what was written.
        StoreError: The store is in trouble.
    """
    known = None if head is None else next((file for file in head.files if file.path == path), None)
    found = run.get(path if known is None else known.name)
    if known is None:
        return None if found is None else found.data
    if found is None or digest(found.data) != known.sha256:
        raise DamagedRecordError(f"{run.url}/{known.name}, which is {path}, is missing or not what was written")
    return found.data
