"""One checkpoint into a bucket, by all processes of a run, and back: complete and proven, or not there.

Every process writes its shards, reads them back, and says in an object of its own what it has read; process 0 adds that
up, compares it with the digests of the devices, and commits. So no process waits for another one on the devices, whose
order of work is the loop's.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, final

from grug_native.bucket.arrays import Block, Layout, Sums, joined, write_arrays
from grug_native.bucket.errors import UnreachableError
from grug_native.bucket.run_head import CheckpointEntry, RunHead, Segment, SmallFile, digest
from grug_native.bucket.run_writer import RunWriter
from grug_native.bucket.store import Store, patiently
from grug_native.checkpoint.metadata import (
    METADATA_FILE,
    CheckpointKind,
    DamagedCheckpointError,
    LeafRecord,
    NoUsableCheckpointError,
)

logger = logging.getLogger(__name__)

_LONGEST_LOOK = 2.0
"""Seconds between two looks for the other processes."""

Label = Literal["corrupt", "abandoned"]


@final
class Upload:
    """One attempt to write a checkpoint, on one process; the prefix is process 0's, and new for every attempt."""

    def __init__(self, store: Store, prefix: str, *, process: int = 0, processes: int = 1, patience: float = 0.0):
        """Writes nothing yet.

        Args:
            store: Where the checkpoint goes.
            prefix: What the names of its objects begin with.
            process: The index of this process.
            processes: How many there are.
            patience: Seconds for which each object is tried again while the store is in trouble.
        """
        self.store, self.prefix = store, prefix
        self._process, self._processes, self._patience = process, processes, patience

    def write(self, layouts: Mapping[str, Layout], blocks: Iterable[Block]) -> dict[str, Sums]:
        """Writes this process's blocks and reads them back; on another process than 0, tells process 0.

        Raises:
            DamagedCheckpointError: The store does not hold what it acknowledged.
            StoreError: It is in trouble.
        """
        first = self._process == 0
        sums = write_arrays(self.store, self.prefix, layouts, blocks, first=first, patience=self._patience)
        if not first:
            self._put(self._part(self._process), json.dumps(sums).encode())
        return sums

    def finish(self, own: Mapping[str, Sums], records: Mapping[str, LeafRecord], metadata: Callable[[], bytes]) -> str:
        """On process 0: waits for the others, proves all that was written, and writes the metadata, once.

        Args:
            own: What `write` returned here.
            records: The arrays with their digests, from the devices.
            metadata: Makes the checkpoint's metadata.

        Returns:
            The SHA-256 of the metadata.

        Raises:
            DamagedCheckpointError: The store does not give back what was written.
            UnreachableError: A process has said nothing for the time of the patience after this one was done.
            StoreError: The store is in trouble.
        """
        found = joined([own, *self._others()])
        wrong = [name for name, record in records.items() if found.get(name) != record.digest]
        if wrong:
            raise DamagedCheckpointError(f"{self._where} does not give back what was written: {', '.join(wrong)}")
        data = metadata()
        self._put(METADATA_FILE, data)
        return digest(data)

    @property
    def _where(self) -> str:
        return f"{self.store.url}/{self.prefix}"

    @staticmethod
    def _part(process: int) -> str:
        return f"parts/{process}.json"

    def _put(self, name: str, data: bytes) -> None:
        key = self.prefix + name
        if patiently(key, lambda: self.store.put(key, data, over=None), patience=self._patience) is None:
            raise DamagedCheckpointError(f"{self.store.url}/{key} is there, and another one")

    def _others(self) -> list[dict[str, Sums]]:
        wanted = {self.prefix + self._part(process) for process in range(1, self._processes)}
        until, pause = time.monotonic() + max(self._patience, 60.0), 0.05
        while wanted and wanted - set(
            patiently(self.prefix, lambda: self.store.list(f"{self.prefix}parts/"), patience=self._patience)
        ):
            if time.monotonic() > until:
                raise UnreachableError(f"{self._where}: another process of this run has not written its part")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK)
        parts: list[dict[str, Sums]] = []
        for key in sorted(wanted):
            found = patiently(key, lambda key=key: self.store.get(key), patience=self._patience)
            if found is None:
                raise DamagedCheckpointError(f"{self.store.url}/{key} was listed, and is not there")
            part = cast(dict[str, Any], json.loads(found.data))
            parts.append({name: (int(pair[0]), int(pair[1])) for name, pair in part.items()})
        return parts


def commit_upload(
    writer: RunWriter,
    upload: Upload,
    sha256: str,
    *,
    step: int,
    kind: CheckpointKind,
    segment: Callable[[], Segment | None],
    written: Sequence[SmallFile] = (),
) -> RunHead:
    """Commits a finished upload, and what the run said until then, in one swap.

    Args:
        writer: Of the run.
        upload: Finished.
        sha256: What `Upload.finish` returned.
        step: Updates done.
        kind: Of the checkpoint.
        segment: Writes the record of the steps before `step` that is not committed.
        written: New versions of files.

    Raises:
        FencedError: Another process has taken the run.
        StoreError: The store is in trouble.
    """
    root = None if upload.store is writer.store else upload.store.url
    entry = CheckpointEntry(step=step, kind=kind, root=root, prefix=upload.prefix, sha256=sha256)
    lines = segment()
    try:
        return writer.commit(entry, lines, written)
    except BaseException:
        if lines is not None:
            writer.give_up(writer.store, lines.name)
        raise


def temporary_store(temporary_root: str, run_id: str, run: Store) -> Store:
    """Returns the folder for the temporary checkpoints of the run in `run`, which a copy of the run does not share."""
    own = digest(run.url.encode())[:8]
    return Store(f"{temporary_root.rstrip('/')}/{run_id}.{own}", field="trainer.temporary_root")


def store_for(writer: RunWriter, kind: CheckpointKind) -> Store:
    """Returns where a checkpoint of this kind goes."""
    return writer.temporary if kind == "temporary" else writer.store


def entry_store(run: Store, entry: CheckpointEntry) -> Store:
    """Returns where a checkpoint is."""
    return run if entry.root is None else Store(entry.root)


def read_metadata_object(run: Store, entry: CheckpointEntry) -> bytes:
    """Returns the metadata of a checkpoint, proven.

    Raises:
        DamagedCheckpointError: It is missing, or not what was committed.
        StoreError: The store is in trouble.
    """
    store, key = entry_store(run, entry), entry.prefix + METADATA_FILE
    found = store.get(key)
    if found is None:
        hint = "" if entry.root is None else "; does a rule of that bucket delete by age?"
        raise DamagedCheckpointError(f"{store.url}/{key} is missing{hint}")
    if digest(found.data) != entry.sha256:
        raise DamagedCheckpointError(f"{store.url}/{key} is not what was committed")
    return found.data


def restore_newest[State](writer: RunWriter, load: Callable[[CheckpointEntry], State]) -> State | None:
    """Loads the newest sound checkpoint, and cuts the record back to it; damaged ones are set aside.

    Args:
        writer: Of the run.
        load: Loads one; raises DamagedCheckpointError if it is damaged, and something else for anything else.

    Returns:
        None if there has never been a checkpoint, damaged or not.

    Raises:
        NoUsableCheckpointError: All are damaged.
        StoreError: The store is in trouble; nothing was set aside for it.
    """
    for entry in reversed(writer.head.checkpoints):
        try:
            state = load(entry)
        except DamagedCheckpointError as error:
            writer.set_aside([entry], "corrupt", str(error))
            logger.error("CHECKPOINT DAMAGED: %s; set aside, untouched; trying the next older one", error)
            continue
        writer.cut(entry.step)
        return state
    check_nothing_is_lost(writer.store, writer.head)
    writer.cut(0)
    return None


def check_nothing_is_lost(store: Store, head: RunHead) -> None:
    """Checks that a run without a checkpoint has never had one.

    Raises:
        NoUsableCheckpointError: It has, and all were damaged.
    """
    corrupt = [aside.entry.prefix for aside in head.set_aside if aside.label == "corrupt"]
    if corrupt and not head.checkpoints:
        raise NoUsableCheckpointError(
            f"no usable checkpoint is left in {store.url}, only {', '.join(corrupt)}: refusing to start from scratch."
            " Give another output_path, or start anew with resume_step 0"
        )
