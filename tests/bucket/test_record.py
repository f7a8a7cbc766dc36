import json
import time
from pathlib import Path

import pytest

from grug_native.bucket.record import DamagedRecordError, Record, committed_record, live_record
from grug_native.bucket.run_head import CheckpointEntry
from grug_native.bucket.run_writer import RunWriter, read_head
from grug_native.bucket.store import Store
from grug_native.tracking.jsonl import JsonlTracker, read_metrics


def commit(writer: RunWriter, record: Record, step: int) -> None:
    prefix = writer.new_name("checkpoints/", step)
    entry = CheckpointEntry(step=step, kind="permanent", root=None, prefix=prefix, sha256="0" * 64)
    writer.commit(entry, record.segment(step))


def log(path: Path, *steps: int, cut: int | None = None) -> None:
    tracker = JsonlTracker(path)
    tracker.truncate_to(cut)
    for step in steps:
        tracker.log({"train/loss": step / 3}, step=step)
    tracker.close()


def test_the_record_is_cut_to_the_checkpoint_and_goes_on_with_the_same_bytes(tmp_path: Path, folder: str) -> None:
    store = Store(folder)
    whole = tmp_path / "whole.jsonl"
    log(whole, *range(7))
    writer, path = RunWriter(store, "run"), tmp_path / "a" / "metrics.jsonl"
    record = Record(writer, path)
    log(path, 0, 1, 2)
    commit(writer, record, 2)
    log(path, 3, 4, 5)
    assert [s.first for s in writer.head.log] == [0], "row 2 is the next segment's"
    commit(writer, record, 5)
    commit(writer, record, 6)
    assert [s.first for s in writer.head.log] == [0, 2, 5], "steps 5 and 6 have a row between them"
    record.stop()
    writer.close()  # as if killed: what is on this disk is lost

    writer, path = RunWriter(store, "run"), tmp_path / "b" / "metrics.jsonl"
    writer.rollback(5)
    record = Record(writer, path)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4]
    log(path, 5, 6, cut=5)
    record.close()
    head, found = read_head(store), store.get("metrics.jsonl")
    assert head is not None and head.owner is None and found is not None
    assert found.data == whole.read_bytes() == committed_record(store, head) == live_record(store)


def test_no_row_between_two_checkpoints_makes_no_segment(tmp_path: Path, folder: str) -> None:
    with RunWriter(Store(folder), "run") as writer:
        record = Record(writer, tmp_path / "metrics.jsonl")
        record.stop()
        commit(writer, record, 2)
        assert writer.head.log == ()
        log(tmp_path / "metrics.jsonl", 2)
        commit(writer, record, 4)
        assert [s.first for s in writer.head.log] == [2]


def test_a_run_can_be_followed_while_it_goes_on(tmp_path: Path, folder: str) -> None:
    store = Store(folder)
    with pytest.raises(FileNotFoundError, match="there is no run, or no such bucket"):
        live_record(store)
    with RunWriter(store, "run") as writer:
        path = tmp_path / "metrics.jsonl"
        record = Record(writer, path, publish_every=0.05)
        for step in range(6):
            log(path, step)
            if step == 3:
                commit(writer, record, 3)
            deadline = time.monotonic() + 30.0
            while live_record(store) != path.read_bytes():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        with path.open("ab") as torn:
            torn.write(b'{"step": 6, "tra')
        record.publish()
        assert [json.loads(line)["step"] for line in live_record(store).splitlines()] == list(range(6))
        record.stop()
        commit(writer, record, 4)
        assert store.list("log/live."), "the object is left, and goes with the next owner"
        assert [json.loads(line)["step"] for line in live_record(store).splitlines()] == list(range(6))
    with RunWriter(store, "run"):
        assert not store.list("log/live.")


def test_a_damaged_segment_is_named_with_the_step_to_go_on_from(tmp_path: Path, folder: str) -> None:
    store = Store(folder)
    with RunWriter(store, "run") as writer:
        path = tmp_path / "metrics.jsonl"
        record = Record(writer, path)
        for step in (2, 4):
            log(path, step - 2, step - 1)
            commit(writer, record, step)
        record.stop()
        name = writer.head.log[1].name
    found = store.get(name)
    assert found is not None
    for broken in (None, found.data.replace(b"2", b"3", 1)):
        store.delete(name) if broken is None else store.overwrite(name, broken)
        words = "is missing" if broken is None else "is not what was committed"
        damaged = pytest.raises(DamagedRecordError, match=f"{name} {words}.*resume_step 2")
        with RunWriter(store, "run") as writer, damaged:
            Record(writer, tmp_path / "again.jsonl")
        with pytest.raises(DamagedRecordError):
            live_record(store)
    with RunWriter(store, "run") as writer:
        writer.rollback(2)
        Record(writer, tmp_path / "again.jsonl").stop()
        assert len(read_metrics(tmp_path / "again.jsonl")) == 2
