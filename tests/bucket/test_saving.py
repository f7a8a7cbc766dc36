import json
from pathlib import Path

import pytest

from grug_native.bucket.errors import UnreachableError
from grug_native.bucket.run_head import CheckpointEntry
from grug_native.bucket.run_writer import RunWriter
from grug_native.bucket.saving import Upload, read_metadata_object, restore_newest, store_for, temporary_store
from grug_native.bucket.store import Store
from grug_native.checkpoint.metadata import DamagedCheckpointError, NoUsableCheckpointError
from tests.bucket.toy import State, at_once, blocks_of, first_state, load, next_state, records, save

STATES = [first_state()]
for _ in range(8):
    STATES.append(next_state(STATES[-1]))


def same(one: State | None, other: State) -> bool:
    return one is not None and {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}


def saved(folder: str, *steps: int) -> Store:
    store = Store(folder)
    with RunWriter(store, "run") as writer:
        for step in steps:
            save(writer, None, STATES[step])
    return store


def test_a_run_without_a_checkpoint_starts_and_one_with_some_takes_the_newest(folder: str) -> None:
    with RunWriter(Store(folder), "run") as writer:
        assert restore_newest(writer, lambda entry: load(writer.store, entry)) is None
        save(writer, None, STATES[2])
        save(writer, None, STATES[4])
        assert same(restore_newest(writer, lambda entry: load(writer.store, entry)), STATES[4])


def test_a_damaged_checkpoint_is_set_aside_untouched_and_the_next_older_one_taken(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved(folder, 2, 4)
    with RunWriter(store, "run") as writer:
        newest = writer.head.checkpoints[1]
        key = f"{newest.prefix}params/w/c/1/0"
        store.overwrite(key, bytes(48))
        before = store.list(newest.prefix)
        assert same(restore_newest(writer, lambda entry: load(store, entry)), STATES[2])
        assert "CHECKPOINT DAMAGED: params.w has digest" in caplog.text and store.list(newest.prefix) == before
        assert [(a.entry, a.label) for a in writer.head.set_aside] == [(newest, "corrupt")]
        store.delete(f"{writer.head.checkpoints[0].prefix}grug_checkpoint.json")
        with pytest.raises(NoUsableCheckpointError, match="refusing to start from scratch"):
            restore_newest(writer, lambda entry: load(store, entry))
    with RunWriter(store, "run") as writer, pytest.raises(NoUsableCheckpointError):
        restore_newest(writer, lambda entry: load(store, entry))


def test_trouble_sets_nothing_aside(folder: str) -> None:
    store = saved(folder, 2, 4)

    def away(entry: CheckpointEntry) -> State:
        raise UnreachableError("away")

    with RunWriter(store, "run") as writer:
        with pytest.raises(UnreachableError):
            restore_newest(writer, away)
        assert writer.head.steps == [2, 4] and writer.head.set_aside == ()


def test_metadata_that_is_not_what_was_committed_is_damage(folder: str) -> None:
    store = saved(folder, 2)
    with RunWriter(store, "run") as writer:
        entry = writer.head.checkpoints[0]
    data = read_metadata_object(store, entry)
    store.overwrite(f"{entry.prefix}grug_checkpoint.json", data + b" ")
    with pytest.raises(DamagedCheckpointError, match="is not what was committed"):
        read_metadata_object(store, entry)


def test_what_a_rule_of_the_temporary_root_deleted_is_said(tmp_path: Path, folder: str) -> None:
    run = Store(folder)
    with RunWriter(run, "run", temporary=temporary_store(f"file://{tmp_path}/t", "run", run)) as writer:
        assert store_for(writer, "permanent") is run and store_for(writer, "temporary") is writer.temporary
        save(writer, None, STATES[2])
        save(writer, None, STATES[4], "temporary")
        assert same(load(run, writer.head.checkpoints[1]), STATES[4])
        writer.temporary.delete_under("checkpoints/")
        with pytest.raises(DamagedCheckpointError, match="is missing; does a rule of that bucket delete by age"):
            load(run, writer.head.checkpoints[1])
        assert same(restore_newest(writer, lambda entry: load(run, entry)), STATES[2])


def test_a_store_that_does_not_hold_what_it_acknowledged_is_caught(folder: str) -> None:
    upload = Upload(Store(folder), "checkpoints/step-2.1-00000000/")
    layouts, blocks = blocks_of(STATES[2])
    sums = upload.write(layouts, blocks)
    with pytest.raises(DamagedCheckpointError, match=r"does not give back what was written: params.w"):
        upload.finish(sums | {"params.w": (1, 2)}, records(STATES[2]), lambda: b"{}")


def test_processes_write_their_parts_and_the_first_adds_them_up(folder: str) -> None:
    layouts, blocks = blocks_of(STATES[2])
    known = records(STATES[2])

    def process(index: int) -> str | None:
        upload = Upload(Store(folder), "checkpoints/step-2.1-00000000/", process=index, processes=2, patience=30.0)
        mine = [b for b in blocks if (b.start != (0,) * b.data.ndim) == bool(index)]
        sums = upload.write(layouts, mine)
        return None if index else upload.finish(sums, known, lambda: b"{}")

    first, second = at_once(lambda: process(0), lambda: process(1))
    assert first is not None and second is None
    store = Store(folder)
    part = store.get("checkpoints/step-2.1-00000000/parts/1.json")
    assert part is not None and list(json.loads(part.data)) == ["params.w"]
