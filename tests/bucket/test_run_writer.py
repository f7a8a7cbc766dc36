import logging
import os
import re
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from grug_native.bucket.errors import UnreachableError
from grug_native.bucket.owner import process_of
from grug_native.bucket.run_head import HEAD, CheckpointEntry, HeadError, Segment, digest
from grug_native.bucket.run_writer import FencedError, RunWriter, read_head
from grug_native.bucket.saving import temporary_store
from grug_native.bucket.store import Store
from grug_native.host.run_folder import RunLockedError
from grug_native.host.signals import ExitCode
from grug_native.launch.exit_codes import explain
from tests.bucket.toy import at_once


def checkpoint(writer: RunWriter, step: int, *, temporary: bool = False) -> CheckpointEntry:
    """A checkpoint of one object."""
    store = writer.temporary if temporary else writer.store
    prefix = writer.new_name("checkpoints/", step)
    store.put(f"{prefix}data", b"x", over=None)
    root = store.url if temporary else None
    kind = "temporary" if temporary else "permanent"
    return CheckpointEntry(step=step, kind=kind, root=root, prefix=prefix, sha256=digest(b"x"))


def lines(writer: RunWriter, first: int) -> Segment:
    data = b'{"step": %d}\n' % first
    name = writer.new_name("log/", first)
    writer.put_once(name, data)
    return Segment(name=name, first=first, size=len(data), sha256=digest(data))


def forget(writer: RunWriter, *, pid: int | None = None) -> None:
    """As if its owner were stopped: it gives no sign of life. It is elsewhere, or process `pid` here."""
    writer._stop.set()  # pyright: ignore[reportPrivateUsage] - nothing but a signal stops it from outside
    writer._beats.join()  # pyright: ignore[reportPrivateUsage] - its thread has to have ended
    host = "elsewhere" if pid is None else writer.owner.host
    process = "" if pid is None else process_of(pid)
    writer._me = replace(writer.owner, host=host, process=process, pid=pid or 1)  # pyright: ignore[reportPrivateUsage] - as if on another machine
    writer.swap(lambda head: replace(head, owner=writer.owner))


def test_a_run_is_claimed_committed_retired_and_closed(folder: str) -> None:
    store = Store(folder)
    assert read_head(store) is None
    with RunWriter(store, "run") as writer:
        assert writer.head.epoch == 1 and writer.head.owner == writer.owner
        first, second = checkpoint(writer, 2), checkpoint(writer, 4)
        writer.commit(first, lines(writer, 0), [writer.put_file("a.txt", b"1")])
        older = writer.head.files[0].name
        writer.commit(second, lines(writer, 2), [writer.put_file("a.txt", b"2")])
        assert writer.head.steps == [2, 4] and store.get(older) is None
        writer.retire([first])
        assert not store.list(first.prefix) and store.list(second.prefix)
    head = read_head(store)
    assert head is not None and head.owner is None and head.steps == [4] and [s.first for s in head.log] == [0, 2]
    with RunWriter(store, "run") as again:
        assert again.head.epoch == 2 and again.head.steps == [4]


def test_an_owner_who_lives_is_named(folder: str) -> None:
    store = Store(folder)
    with RunWriter(store, "run", lease=1.0) as writer:
        with pytest.raises(
            RunLockedError, match=f"is being written to by process {os.getpid()} of {socket.gethostname()}"
        ):
            RunWriter(Store(folder), "run", lease=0.1)
        writer.commit(checkpoint(writer, 2))


def test_one_that_is_stopped_in_order_meanwhile_is_followed(folder: str) -> None:
    writer = RunWriter(Store(folder), "run", lease=3.0)
    forget(writer)
    at_once(
        lambda: (time.sleep(0.7), writer.swap(lambda head: head.released())),
        lambda: RunWriter(Store(folder), "run").close(),
    )
    head = read_head(Store(folder))
    assert head is not None and head.epoch == 2


def test_a_zombie_commits_nothing_and_what_it_wrote_is_swept(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    zombie = RunWriter(Store(folder), "run", lease=0.4)
    zombie.commit(checkpoint(zombie, 2), lines(zombie, 0))
    forget(zombie)
    began = time.monotonic()
    owner = RunWriter(Store(folder), "run", lease=60.0)
    assert time.monotonic() - began >= 0.4, "the lease is the owner's"
    late, late_lines = checkpoint(zombie, 4), lines(zombie, 2)
    with pytest.raises(
        FencedError, match=r"run.json was changed by another process .*has committed nothing since"
    ) as error:
        zombie.commit(late, late_lines)
    assert explain(error.value) == (ExitCode.LOCKED, str(error.value))
    for action in (zombie.check, zombie.close, lambda: zombie.retire(zombie.head.checkpoints)):
        with pytest.raises(FencedError):
            action()
    assert owner.head.steps == [2] and owner.store.list(owner.head.checkpoints[0].prefix)
    owner.close()
    with caplog.at_level(logging.WARNING), RunWriter(Store(folder), "run") as last:
        assert last.head.steps == [2] and not last.store.list(late.prefix) and last.store.get(late_lines.name) is None
    assert late.prefix in caplog.text and "did not commit" in caplog.text


def test_a_sign_of_life_finds_out_that_the_run_was_taken(folder: str) -> None:
    zombie = RunWriter(Store(folder), "run", lease=0.4)
    other = Store(folder)
    head = read_head(other)
    found = other.get(HEAD)
    assert head is not None and found is not None
    other.overwrite(HEAD, replace(head.claimed(replace(zombie.owner, nonce="f" * 8)), serial=10_000).encode())
    with pytest.raises(FencedError):
        for _ in range(100):
            time.sleep(0.05)
            zombie.check()


def test_a_process_that_ended_here_need_not_be_waited_for(folder: str) -> None:
    child = subprocess.Popen(["sleep", "100"])
    forget(RunWriter(Store(folder), "run", lease=1000.0), pid=child.pid)
    with pytest.raises(LookupError, match="waiting"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", waiting)
        RunWriter(Store(folder), "run")
    child.kill()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", waiting)
        RunWriter(Store(folder), "run").close()
    child.wait()


def waiting(seconds: float) -> None:
    raise LookupError("waiting")


def test_of_several_starters_one_owns_the_run(folder: str) -> None:
    def start() -> RunWriter | RunLockedError:
        try:
            return RunWriter(Store(folder), "run", lease=1.0)
        except RunLockedError as error:
            return error

    found = at_once(*[start] * 4)
    owners = [one for one in found if isinstance(one, RunWriter)]
    assert len(owners) == 1
    owners[0].check()
    owners[0].close()


def test_a_swap_that_seemed_to_fail_and_was_made_is_gone_on_from(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(Store(folder), "run", lease=1000.0)
    entry = checkpoint(writer, 2)
    put = writer.store.put

    def late(key: str, data: bytes, *, over: bytes | None) -> bytes | None:
        put(key, data, over=over)
        raise UnreachableError("no answer")

    monkeypatch.setattr(writer.store, "put", late)
    with pytest.raises(UnreachableError):
        writer.commit(entry)
    monkeypatch.setattr(writer.store, "put", put)
    assert writer.head.steps == []
    writer.give_up(writer.store, entry.prefix)  # as its caller does
    other = checkpoint(writer, 4)
    writer.commit(other)
    assert writer.head.steps == [2, 4] and writer.store.list(entry.prefix), "it was committed, so it stays"
    writer.close()


def test_an_attempt_that_was_given_up_is_deleted_with_the_next_change(folder: str) -> None:
    with RunWriter(Store(folder), "run") as writer:
        failed, under_way = checkpoint(writer, 2), checkpoint(writer, 4)
        writer.give_up(writer.store, failed.prefix)
        writer.record(None, [writer.put_file("a", b"1")])
        assert not writer.store.list(failed.prefix) and writer.store.list(under_way.prefix)
        writer.commit(under_way)


def test_nothing_that_the_run_did_not_write_is_swept(folder: str) -> None:
    with RunWriter(Store(folder), "run") as writer:
        writer.commit(checkpoint(writer, 2))
        orphan = checkpoint(writer, 4)
    mine = ["checkpoints/mine/x", "checkpoints/step-4/x", "log/notes.jsonl", "files/readme", "notes.txt"]
    for key in mine:
        writer.store.overwrite(key, b"1")
    with RunWriter(Store(folder), "run") as again:
        assert not again.store.list(orphan.prefix) and set(mine) <= set(again.store.list(""))


def test_a_head_that_is_missing_or_damaged_is_no_fresh_start(folder: str) -> None:
    store = Store(folder)
    with RunWriter(store, "run") as writer:
        writer.commit(checkpoint(writer, 2))
    head = store.get(HEAD)
    assert head is not None
    store.delete(HEAD)
    with pytest.raises(
        HeadError, match=r"run.json is missing, and checkpoints/step-2.* refusing to start from scratch"
    ):
        RunWriter(store, "run")
    store.overwrite(HEAD, head.data[:-10])
    with pytest.raises(HeadError, match="is damaged"):
        RunWriter(store, "run")
    store.overwrite(HEAD, head.data)
    RunWriter(store, "run").close()


def test_a_run_is_stepped_back_and_nothing_is_deleted_but_the_record(folder: str) -> None:
    with RunWriter(Store(folder), "run") as writer:
        for step in (2, 4, 6):
            writer.commit(checkpoint(writer, step), lines(writer, step - 2))
        dropped = writer.head.log[1:]
        newer = writer.rollback(2)
        assert [c.step for c in newer] == [4, 6] and writer.head.steps == [2] and len(writer.head.log) == 1
        assert all(writer.store.list(c.prefix) for c in newer) and not any(writer.store.get(s.name) for s in dropped)
        assert [a.label for a in writer.head.set_aside] == ["abandoned"] * 2
        writer.commit(checkpoint(writer, 4), lines(writer, 2))


def test_temporary_checkpoints_have_a_root_of_their_own(tmp_path: Path, folder: str) -> None:
    run, root = Store(folder), f"file://{tmp_path}/temporary"
    place = temporary_store(root, "run", run)
    assert re.fullmatch(rf"{re.escape(root)}/run\.[0-9a-f]{{8}}", place.url)
    assert temporary_store(root, "run", Store(f"{folder}-copy")).url != place.url
    with RunWriter(run, "run", temporary=place) as writer:
        entry = checkpoint(writer, 2, temporary=True)
        writer.commit(entry)
        orphan = checkpoint(writer, 4, temporary=True)
        assert place.list("") == sorted([f"{entry.prefix}data", f"{orphan.prefix}data"])
    with RunWriter(run, "run", temporary=place) as writer:
        assert place.list("") == [f"{entry.prefix}data"]
        writer.commit(checkpoint(writer, 4))
        writer.retire([entry])
        assert place.list("") == []


def test_a_copy_of_a_run_deletes_nothing_of_the_first(tmp_path: Path, folder: str) -> None:
    run, root = Store(folder), f"file://{tmp_path}/temporary"
    place = temporary_store(root, "run", run)
    with RunWriter(run, "run", temporary=place) as writer:
        writer.commit(checkpoint(writer, 2, temporary=True))
    copy = Store(f"{folder}-copy")
    for key in run.list(""):
        found = run.get(key)
        assert found is not None
        copy.overwrite(key, found.data)
    with RunWriter(copy, "run", temporary=temporary_store(root, "run", copy)) as second:
        second.retire(second.head.checkpoints)
        assert second.head.steps == []
    assert len(place.list("")) == 1
