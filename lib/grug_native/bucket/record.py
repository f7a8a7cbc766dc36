"""The record of a run in a bucket: `metrics.jsonl` on this machine's disk, committed in segments of whole lines.

A segment is committed in the swap that commits a checkpoint, and ends where the checkpoint does. What is not committed
yet can be followed: it is published as an object of its own, which is no part of the record.
"""

import json
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import final

from grug_native.bucket.errors import StoreError
from grug_native.bucket.run_head import HEAD, RunHead, Segment, SmallFile, digest, live_name
from grug_native.bucket.run_writer import FencedError, RunWriter, read_head
from grug_native.bucket.store import Store

logger = logging.getLogger(__name__)

_METRICS = "metrics.jsonl"
_TRIES = 5
"""How often a reader looks again at a run that goes on under its eyes."""


class DamagedRecordError(RuntimeError):
    """A part of a run's record is not what was committed."""


@final
class Record:
    """The record of a run that this process owns. `path` is appended to by the tracker, line by line."""

    def __init__(self, writer: RunWriter, path: Path, *, publish_every: float = 60.0):
        """Fetches what is committed to `path`, which is overwritten, and begins to publish what comes.

        Args:
            writer: Of the run; its record has been cut to the checkpoint that the run goes on from.
            path: The file on this machine.
            publish_every: Seconds between two publications.

        Raises:
            DamagedRecordError: A segment is missing, or not what was committed.
            StoreError: The store is in trouble.
        """
        self._writer, self._path = writer, path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(committed_record(writer.store, writer.head))
        self._published = b""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish, args=(publish_every,), daemon=True, name="grug-record")
        self._thread.start()

    def segment(self, before: int | None) -> Segment | None:
        """Writes the lines that are not committed and of steps before `before` as an object, for `commit` to name.

        Returns:
            None if there is no such line.

        Raises:
            StoreError: The store is in trouble.
        """
        tail = self._tail(self._writer.head)
        lines: list[bytes] = []
        for line in tail.splitlines(keepends=True):
            if not line.endswith(b"\n") or (before is not None and _step(line) >= before):
                break
            lines.append(line)
        if not lines:
            return None
        data, first = b"".join(lines), _step(lines[0])
        name = self._writer.new_name("log/", first)
        self._writer.put_once(name, data)
        return Segment(name=name, first=first, size=len(data), sha256=digest(data))

    def publish(self) -> None:
        """Publishes what is not committed, if there is more of it than last time."""
        head = self._writer.head
        tail = self._tail(head)
        data = json.dumps({"offset": head.record_bytes}).encode() + b"\n" + tail
        if data != self._published:
            self._writer.store.overwrite(live_name(self._writer.owner, head.epoch), data)
            self._published = data

    def close(self, written: tuple[SmallFile, ...] = ()) -> None:
        """Commits the rest, puts the whole as `metrics.jsonl`, and gives the run up."""
        self.stop()
        store = self._writer.store
        older = store.get(_METRICS)
        self._writer.record(self.segment(None), written)  # proves that the run is still this process's
        whole = self._path.read_bytes()
        if older is None or older.data != whole:
            store.put(_METRICS, whole, over=None if older is None else older.generation)
        store.delete(live_name(self._writer.owner, self._writer.head.epoch))
        self._writer.close()

    def stop(self) -> None:
        """Publishes no more, and commits nothing."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close() if error is None else self.stop()

    def _tail(self, head: RunHead) -> bytes:
        with self._path.open("rb") as file:
            file.seek(head.record_bytes)
            return file.read()

    def _publish(self, every: float) -> None:
        while not self._stop.wait(every):
            try:
                self._writer.check()
                self.publish()
            except FencedError:
                return
            except StoreError as error:
                logger.warning("the latest metrics are not published: %s", error)


def committed_record(store: Store, head: RunHead) -> bytes:
    """Returns the record that `head` names, proven.

    Raises:
        DamagedRecordError: A segment is missing, or not what was committed.
        StoreError: The store is in trouble.
    """
    return b"".join(_proven(store, head, segment) for segment in head.log)


def live_record(store: Store) -> bytes:
    """Returns the record of a run that goes on, up to what its owner has published last; whole lines.

    Raises:
        FileNotFoundError: There is no run.
        DamagedRecordError: A segment is missing, or not what was committed.
        StoreError: The store is in trouble.
    """
    record = b""
    for attempt in range(_TRIES):
        head = read_head(store)
        if head is None:
            raise FileNotFoundError(f"{store.url}/{HEAD} is missing: there is no run, or no such bucket")
        found = None if head.owner is None else store.get(live_name(head.owner, head.epoch))
        try:
            record = committed_record(store, head)
        except DamagedRecordError:
            if attempt + 1 == _TRIES or read_head(store) == head:
                raise
            continue  # cut back meanwhile
        if found is None:
            return record
        label, _, tail = found.data.partition(b"\n")
        offset = int(json.loads(label)["offset"])
        if offset <= len(record):
            more = tail[len(record) - offset :]
            return record + more[: more.rfind(b"\n") + 1]
    return record


def _proven(store: Store, head: RunHead, segment: Segment) -> bytes:
    found = store.get(segment.name)
    if found is None or digest(found.data) != segment.sha256:
        older = [step for step in head.steps if step <= segment.first]
        way_out = f"resume_step {older[-1] if older else 0}, from which on the record is made anew"
        raise DamagedRecordError(
            f"{store.url}/{segment.name} is {'missing' if found is None else 'not what was committed'}: put it back, or"
            f" go on with {way_out}"
        )
    return found.data


def _step(line: bytes) -> int:
    return int(json.loads(line)["step"])
