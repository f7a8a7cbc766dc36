"""A run is killed before and after its changing requests; whoever goes on ends with the same bytes."""

import signal
from collections import Counter
from functools import partial
from typing import Literal

import pytest

from grug_native.bucket.run_writer import read_head
from grug_native.bucket.store import Store
from tests.bucket.proxy import Rule, changes
from tests.bucket.servers import Bucket
from tests.bucket.toy import QUICK, STEPS, Job, Outcome, Server, at_once, outcome

KILLS: tuple[Literal["kill", "kill_after"], ...] = ("kill", "kill_after")


def undisturbed(bucket: Bucket, toys: Server) -> Outcome:
    url = bucket.new_folder("whole")
    toys.run(Job(url=url, environment=bucket.environment())).expect(0)
    found = outcome(url)
    assert found.record == found.metrics and found.record.count(b"\n") == STEPS + 1 and found.steps == [4, 6]
    return found


def sweep(bucket: Bucket, toys: Server, whole: Outcome, do: Literal["kill", "kill_after"], every: int) -> Counter[int]:
    """Kills a run at every so many changing requests; counts from which steps the others went on."""
    seen: Counter[int] = Counter()
    for number in range(0, 1000, every):
        job = Job(url=bucket.new_folder(), environment=bucket.environment())
        rule = Rule(do, changes(job.url), after=number)
        killed = toys.run(job, before=partial(bucket.proxy.aim, rule))
        if killed.code == 0:
            break
        killed.expect(-signal.SIGKILL)
        head = read_head(Store(job.url, retries=QUICK))
        seen[head.steps[-1] if head and head.steps else 0] += 1
        toys.run(job).expect(0)
        found = outcome(job.url)
        assert (found.record, found.metrics, found.state) == (whole.record, whole.metrics, whole.state), (do, number)
        # One more stays if nothing was left to do after the kill but to retire it.
        assert found.steps in ([4, 6], [2, 4, 6]), (do, number, found.steps)
    return seen


def sweeps(bucket: Bucket, toys: Server, *, every: int) -> list[Counter[int]]:
    """Before and after the requests."""
    whole = undisturbed(bucket, toys)
    return at_once(*(partial(sweep, bucket, toys, whole, do, every) for do in KILLS))


def test_a_kill_at_every_fourth_request_changes_nothing(bucket: Bucket, toys: Server) -> None:
    for seen in sweeps(bucket, toys, every=4):
        print(seen)
        assert seen.total() >= 12 and set(seen) == {0, 2, 4, 6}


@pytest.mark.slow_faults
@pytest.mark.timeout(1800)
def test_a_kill_at_any_request_changes_nothing(bucket: Bucket, toys: Server) -> None:
    for seen in sweeps(bucket, toys, every=1):
        print(seen)
        assert seen.total() >= 48
