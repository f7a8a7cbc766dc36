"""Runs of the trainer in a bucket: killed, fenced, raced for, cut off from their store; against one on a disk."""

import signal
import time
from pathlib import Path

import pytest

from grug_native.bucket.store import Store
from tests.bucket.proxy import Rule
from tests.bucket.runs import BucketRun, bucket_run
from tests.bucket.servers import Bucket
from tests.faults.runs import ForkServer, Run
from tests.faults.soak import soak_bucket

KILL_POINTS = "compile:0 data:3 step:3 log:3 pre_save:4 after_d2h:4 mid_write:4 pre_commit:4 post_commit:4 fetch:5"
LONG = {"trainer.num_train_steps": 40}
"""A run that takes seconds, with twenty checkpoints."""


ONE_STORE = pytest.mark.parametrize("bucket", ["gcs", pytest.param("s3", marks=pytest.mark.slow_faults)], indirect=True)
"""For what is the protocol's, which the stores do not tell apart; the other one has its turn beside the slow faults."""


@pytest.fixture(scope="session")
def whole(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run on a disk, with evaluations. Not to be written to."""
    run = server.run(tmp_path_factory.mktemp("whole") / "run", base="eval")
    run.fit().expect(0)
    return run


@pytest.fixture
def run(server: ForkServer, bucket: Bucket, tmp_path: Path) -> BucketRun:
    """The same in a bucket, not started."""
    return bucket_run(server, bucket, tmp_path / "run", base="eval")


def test_sigkill_at_each_point(run: BucketRun, whole: Run) -> None:
    """Each process goes on from what the one before has left, and is killed a point later; the last is not."""
    for fault, code in [*((f"kill@{point}", -signal.SIGKILL) for point in KILL_POINTS.split()), (None, 0)]:
        before = run.steps
        words = [f"resuming from {run.url}/checkpoints/step-{before[-1]}."] if before else ["starting from scratch"]
        run.fit(fault).expect(code, *words)
    run.expect_equal(whole)
    assert run.leftovers() == []


@ONE_STORE
def test_a_zombie_commits_nothing(server: ForkServer, bucket: Bucket, tmp_path: Path) -> None:
    """Stopped for longer than the lease, then woken up while another process has finished the run."""
    run = bucket_run(server, bucket, tmp_path / "run", LONG | {"trainer.store_lease_seconds": 4.0})
    zombie = run.start()
    zombie.until(lambda: run.steps and run.steps[-1] >= 4)
    zombie.send(signal.SIGSTOP)
    run.fit().expect(0, "waiting 4 s for a sign of life", "resuming from")
    head = run.head
    zombie.send(signal.SIGCONT)
    zombie.wait().expect(4, "was changed by another process", "does not own the run any more")
    assert run.head == head and run.steps[-1] == 40
    assert len(run.record()) == 40


@ONE_STORE
def test_of_three_starters_one_runs(server: ForkServer, bucket: Bucket, tmp_path: Path) -> None:
    run = bucket_run(server, bucket, tmp_path / "run", LONG | {"trainer.store_lease_seconds": 20.0})
    starters = [run.start() for _ in range(3)]
    assert sorted(starter.wait().code for starter in starters) == [0, 4, 4]
    assert run.steps[-1] == 40 and len(run.record()) == 40


@ONE_STORE
def test_the_run_outlives_an_outage(run: BucketRun, bucket: Bucket, whole: Run) -> None:
    """All requests fail for a while; training goes on, and nothing is set aside or lost."""
    process = run.start("sleep@step:7")
    process.until(lambda: run.steps and run.steps[-1] >= 4)
    process.kill()
    process = run.start()
    process.until_said("resuming from")
    bucket.proxy.set_rules(Rule("answer", match=".", times=10**6))
    time.sleep(12)
    bucket.proxy.set_rules()
    process.wait().expect(0)
    run.expect_equal(whole)
    assert run.head.set_aside == ()


@ONE_STORE
def test_a_flipped_bit_is_set_aside(run: BucketRun, whole: Run) -> None:
    """In the newest checkpoint: the run goes on from the one before it, and comes to the same."""
    run.fit(stop_after=4).expect(0)
    newest = run.head.checkpoints[-1]
    store = Store(run.url)
    key = next(key for key in store.list(f"{newest.prefix}params/") if not key.endswith("zarr.json"))
    found = store.get(key)
    assert found is not None
    store.overwrite(key, bytes([found.data[0] ^ 1]) + found.data[1:])
    run.fit().expect(0, "CHECKPOINT DAMAGED", "resuming from", "step-2.")
    run.expect_equal(whole)
    assert [aside.entry.step for aside in run.head.set_aside] == [4]


@ONE_STORE
def test_temporary_checkpoints_elsewhere(server: ForkServer, bucket: Bucket, tmp_path: Path, whole: Run) -> None:
    """They go under another root, and are resumed from; what is kept for good is in the run's own folder."""
    root = bucket.new_folder("tmp")
    changes = {
        "trainer.temporary_root": root,
        "trainer.steps_per_checkpoint": None,
        "trainer.minutes_per_temporary_checkpoint": 1e-9,
    }
    run = bucket_run(server, bucket, tmp_path / "run", changes, base="eval")
    run.fit(stop_after=5).expect(0)
    assert run.head.checkpoints and all(entry.root for entry in run.head.checkpoints)
    run.fit().expect(0, f"resuming from {root}/")
    run.expect_equal(whole)
    assert run.head.checkpoints[-1].root is None


def test_what_one_can_do_with_it(run: BucketRun) -> None:
    """Every command that reads a run reads one in a bucket."""
    run.fit(stop_after=4).expect(0)
    url = run.url
    run.grug("plan", url).expect(0, "goes on from step 4", "in a bucket")
    run.grug("eval", url, "--ema").expect(0, "after 4 steps", "eval/ema/loss")
    run.grug("sample", url, "the", "--max_new_tokens", "4").expect(0)
    run.grug("plot", url).expect(0, f"{url}/loss.png")
    run.grug("ckpt", "ls", url).expect(0, "step-4", "committed")
    run.grug("ckpt", "show", url).expect(0, "data_offset")
    run.grug("ckpt", "verify", url).expect(0, "step-4: sound", "step-2: sound")
    run.grug("ckpt", "diff", url, "2", "4", "--values").expect(0, "max |a - b|")
    run.grug("train", "--config_path", url).expect(0, "resuming from", "held-out loss")
    run.grug("train", "--config_path", url).expect(0, "finished before, after 8 steps")
    keys = Store(url).list("")
    assert {"loss.png", "log.txt", "metrics.jsonl", "run.json", "speedrun_results.json"} <= set(keys)


def test_what_cannot_be_used_is_said_in_a_line(server: ForkServer, bucket: Bucket, tmp_path: Path) -> None:
    scheme = bucket.scheme
    missing = server.run(tmp_path / "missing", {"output_path": f"{scheme}://no-such-bucket/run"})
    missing.fit(environment=bucket.environment()).expect(1, "there is no bucket 'no-such-bucket'")
    dead = bucket_run(server, bucket, tmp_path / "dead")
    dead.fit(environment=bucket.environment(url="http://127.0.0.1:9")).expect(1, "the store does not answer")
    bucket.proxy.set_rules(Rule("answer", match="^(PUT|POST)", status=403, times=10**6))
    dead.fit().expect(1, "the credentials may not do this")
    bucket.proxy.set_rules()
    dead.grug("eval", dead.url).expect(2, "has no config.yaml")
    dead.grug("ckpt", "ls", dead.url).expect(2, "holds no checkpoint")


@pytest.mark.slow_faults
@pytest.mark.timeout(900)
def test_sigkill_at_random_moments(server: ForkServer, bucket: Bucket, tmp_path: Path) -> None:
    """A short one of `python -m tests.faults.soak --output URL`."""
    assert "undisturbed" in soak_bucket(
        server, bucket.new_folder(), tmp_path, kills=12, steps=200, seed=3, bucket=bucket
    )
