"""Runs in processes of their own, against real servers that fail in between."""

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grug_native.bucket.errors import CredentialsError, StoreError, UnreachableError
from grug_native.bucket.record import DamagedRecordError, committed_record, live_record
from grug_native.bucket.run_head import HeadError, RunHead
from grug_native.bucket.run_writer import RunWriter, read_head
from grug_native.bucket.saving import restore_newest
from grug_native.bucket.store import Retries, Store
from grug_native.checkpoint.metadata import NoUsableCheckpointError
from tests.bucket.proxy import Rule, changes
from tests.bucket.servers import Bucket
from tests.bucket.toy import QUICK, STEPS, Job, Outcome, Server, State, first_state, load, next_state, outcome, until

ALWAYS = 1_000_000


@pytest.fixture
def job(bucket: Bucket) -> Job:
    return Job(url=bucket.new_folder(), environment=bucket.environment())


def changed(job: Job, **fields: Any) -> Job:
    return Job(**{**job.__dict__, **fields})


def head_of(job: Job) -> RunHead:
    head = read_head(Store(job.url, retries=QUICK))
    assert head is not None
    return head


def expect_whole(job: Job) -> Outcome:
    """Asserts that the run ended as one that nothing disturbed."""
    state = first_state()
    for _ in range(job.steps):
        state = next_state(state)
    found = outcome(job.url)
    assert found.state == {n: a.tobytes() for n, a in state.items()}
    assert found.record == found.metrics and found.record.count(b"\n") == job.steps + 1
    return found


def test_a_run_goes_on_through_an_outage(bucket: Bucket, toys: Server, job: Job, tmp_path: Path) -> None:
    """Longer than the lease, and longer than TensorStore itself tries again."""
    job = changed(job, lease=1.0, marks=tmp_path / "marks", publish_every=0.2)
    running = toys.start(job)
    until(lambda: read_head(Store(job.url, retries=QUICK)) is not None and head_of(job).steps)
    for status in (503, 403):
        bucket.proxy.set_rules(Rule("answer", "^", times=ALWAYS, status=status))
        time.sleep(1.5)
        bucket.proxy.set_rules()
        time.sleep(0.3)
    running.wait()
    running.expect(0, "is tried again for")
    expect_whole(job)


def test_a_store_that_stays_away_ends_the_run_with_its_last_commit(bucket: Bucket, toys: Server, job: Job) -> None:
    job = changed(job, patience=0.5)
    rule = Rule("answer", changes(job.url), after=45, times=ALWAYS)
    toys.run(job, before=lambda _: bucket.proxy.set_rules(rule)).expect(1, "UnreachableError", job.url)
    assert rule.struck > 0
    bucket.proxy.set_rules()
    before = head_of(job)
    assert before.steps and before.set_aside == ()
    toys.run(job).expect(0)
    expect_whole(job)


def test_answers_that_are_lost_or_cut_all_the_time_change_nothing(bucket: Bucket, toys: Server, job: Job) -> None:
    matches = changes(job.url)
    rules = [Rule("lost", matches, after=3 * n) for n in range(12)] + [
        Rule("cut", matches, after=5 * n) for n in range(8)
    ]
    toys.run(job, before=lambda _: bucket.proxy.set_rules(*rules)).expect(0)
    assert all(rule.struck for rule in rules)
    expect_whole(job)


def test_a_zombie_commits_nothing(bucket: Bucket, toys: Server, job: Job) -> None:
    """It is stopped on its way to a commit, longer than its lease, and goes on when the run is another one's."""
    job = changed(job, lease=1.0, patience=2.0)
    rule = Rule("stop", f"^(PUT|POST).*{job.url.rpartition('/')[2]}/run.json", after=3)
    zombie = toys.start(job, before=partial(bucket.proxy.aim, rule))
    until(lambda: Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    toys.run(job).expect(0)
    whole = expect_whole(job)
    before = {key: Store(job.url, retries=QUICK).get(key) for key in Store(job.url, retries=QUICK).list("")}
    zombie.send(signal.SIGCONT)
    zombie.wait()
    zombie.expect(4, "FencedError", "run.json was changed by another process")
    assert outcome(job.url) == whole
    after = Store(job.url, retries=QUICK)
    assert {key: after.get(key) for key in before} == before, "nothing of the other one's was touched"
    orphans = set(after.list("")) - set(before)
    toys.run(job).expect(0)
    assert not orphans & set(after.list(""))


def test_of_three_at_once_one_runs(bucket: Bucket, toys: Server, job: Job) -> None:
    job = changed(job, lease=2.0, pause=0.6)  # So long that the last starts while the first still runs.
    started = [toys.start(job) for _ in range(3)]
    assert sorted(running.wait() for running in started) == [0, 4, 4]
    for running in started:
        if running.code == 4:
            running.expect(4, "RunLockedError", job.url)
    expect_whole(job)


def test_an_owner_on_this_machine_that_was_killed_is_not_waited_for(bucket: Bucket, toys: Server, job: Job) -> None:
    job = changed(job, lease=1000.0, pause=0.1)
    running = toys.start(job)
    until(lambda: read_head(Store(job.url, retries=QUICK)) is not None and head_of(job).steps)
    running.kill()
    assert head_of(job).owner is not None
    toys.run(job).expect(0)
    expect_whole(job)


def test_a_run_is_followed_while_it_goes_on(bucket: Bucket, toys: Server, job: Job) -> None:
    job = changed(job, pause=0.1, publish_every=0.05)
    store, seen = Store(job.url, retries=QUICK), [b""]
    running = toys.start(job)
    until(lambda: read_head(store) is not None)
    while running.process.is_alive():
        seen.append(live_record(store))
    running.wait()
    running.expect(0)
    whole = expect_whole(job).record
    assert len(set(seen)) >= 5 and all(whole.startswith(part) for part in seen) and seen == sorted(seen, key=len)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (503, b"", UnreachableError),
        (429, b"", UnreachableError),
        (403, b"", CredentialsError),
        (401, b"", CredentialsError),
        (400, b"<Error><Code>ExpiredToken</Code></Error>", CredentialsError),
    ],
)
def test_trouble_while_loading_sets_nothing_aside(
    bucket: Bucket, toys: Server, job: Job, status: int, body: bytes, kind: type[StoreError]
) -> None:
    toys.run(job).expect(0)
    store = Store(job.url, retries=Retries(0.01, 0.02, 2))
    before = store.list("")
    with RunWriter(store, "toy") as writer:
        for match in ("^(GET|HEAD) .*zarr.json", "^(GET|HEAD) .*/c/", "^(GET|HEAD) .*grug_checkpoint"):
            bucket.proxy.set_rules(Rule("answer", match, times=ALWAYS, status=status, body=body))
            with pytest.raises(kind):
                restore_newest(writer, lambda entry: load(store, entry))
            bucket.proxy.set_rules()
        assert writer.head.steps == [STEPS - 2, STEPS] and writer.head.set_aside == ()
    assert store.list("") == before


def flip(store: Store, rng: random.Random) -> tuple[str, bytes]:
    """Flips a bit of an object; returns what it was."""
    key = rng.choice(store.list(""))
    found = store.get(key)
    assert found is not None
    broken = bytearray(found.data)
    broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
    store.overwrite(key, bytes(broken))
    return key, found.data


def flips(url: str, toys: Server | None, job: Job, count: int) -> dict[str, int]:
    """Flips a bit in any object of a finished run, and loads it; again and again."""
    store, rng = Store(url, retries=QUICK), random.Random(0)
    states: dict[int, State] = {0: first_state()}
    for step in range(job.steps):
        states[step + 1] = next_state(states[step])
    head, seen = store.get("run.json"), {"refused": 0, "older": 0, "same": 0}
    assert head is not None
    whole = outcome(url)
    for _ in range(count):
        key, sound = flip(store, rng)
        try:
            with RunWriter(store, "toy", lease=1000.0) as writer:
                entry_steps = writer.head.steps
                state = restore_newest(writer, lambda entry: load(store, entry))
                assert state is not None
                step = int(state["step"])
                assert {n: a.tobytes() for n, a in state.items()} == {
                    n: a.tobytes() for n, a in states[step].items()
                }, key
                seen["same" if step == entry_steps[-1] else "older"] += 1
                lines = b"".join(whole.record.splitlines(keepends=True)[:step])
                assert committed_record(store, writer.head) == lines, key
        except (HeadError, DamagedRecordError, NoUsableCheckpointError):
            seen["refused"] += 1
        store.overwrite(key, sound)
        store.overwrite("run.json", head.data)
        for segment in RunHead.decode(head.data, where=url).log:
            if store.get(segment.name) is None:  # cut with the run; it is put back with it
                first = segment.first
                rows = [r for r in whole.record.splitlines(keepends=True) if first <= int(r[9 : r.index(b",")])]
                store.overwrite(segment.name, b"".join(rows)[: segment.size])
    assert outcome(url) == whole
    return seen


def test_a_flipped_bit_is_never_loaded(bucket: Bucket, toys: Server, job: Job) -> None:
    toys.run(job).expect(0)
    seen = flips(job.url, toys, job, 25)
    print(seen)
    assert seen["refused"] and seen["older"]


def test_two_hundred_flipped_bits_are_never_loaded(toys: Server, folder: str) -> None:
    job = Job(url=folder, environment={})
    toys.run(job).expect(0)
    seen = flips(folder, toys, job, 200)
    print(seen)
    assert min(seen.values()) >= 5
