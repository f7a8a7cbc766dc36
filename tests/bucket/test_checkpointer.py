"""Runs of the trainer in a bucket: killed, fenced, raced for, cut off from their store; against one on a disk."""

import signal
import time
from pathlib import Path

import pytest

from grug_native.bucket.store import Store
from tests.bucket.proxy import Rule
from tests.bucket.runs import BucketRun, bucket_run
from tests.bucket.servers import Bucket
from tests.faults.runs import Ended, ForkServer, Run, Running, two_environments
from tests.faults.soak import soak_bucket
from tests.fixtures_data import make_text, write_rolling_task

KILL_POINTS = "compile:0 data:3 step:3 log:3 pre_save:4 after_d2h:4 mid_write:4 pre_commit:4 post_commit:4 fetch:5"
LONG = {"trainer.num_train_steps": 40}
"""A run that takes seconds, with twenty checkpoints."""


ONE_STORE = pytest.mark.parametrize("bucket", ["gcs", pytest.param("s3", marks=pytest.mark.slow_faults)], indirect=True)
"""For what is the protocol's, which the stores do not tell apart; the other one has its turn beside the slow faults, as
have the real trainer's kills, rivals and outages: those of a smaller program are in `test_kills` and `test_faults`."""


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


@pytest.mark.slow_faults
def test_sigkill_at_each_point(run: BucketRun, whole: Run) -> None:
    """Each process goes on from what the one before has left, and is killed a point later; the last is not."""
    for fault, code in [*((f"kill@{point}", -signal.SIGKILL) for point in KILL_POINTS.split()), (None, 0)]:
        before = run.steps
        words = [f"resuming from {run.url}/checkpoints/step-{before[-1]}."] if before else ["starting from scratch"]
        run.fit(fault).expect(code, *words)
    run.expect_equal(whole)
    assert run.leftovers() == []


@pytest.mark.slow_faults
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


@pytest.mark.slow_faults
def test_of_three_starters_one_runs(server: ForkServer, bucket: Bucket, tmp_path: Path) -> None:
    run = bucket_run(server, bucket, tmp_path / "run", LONG | {"trainer.store_lease_seconds": 20.0})
    starters = [run.start() for _ in range(3)]
    assert sorted(starter.wait().code for starter in starters) == [0, 4, 4]
    assert run.steps[-1] == 40 and len(run.record()) == 40


@pytest.mark.slow_faults
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


@ONE_STORE
def test_what_one_can_do_with_it(run: BucketRun, tmp_path: Path) -> None:
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
    run.grug("train", "--config_path", url, "--profile", "5:2").expect(0, "resuming from", "held-out loss")
    run.grug("train", "--config_path", url).expect(0, "finished before, after 8 steps")
    run.grug("export", url, "--output", str(tmp_path / "llama")).expect(0, "exported 21 tensors")
    begun = ("train", "--config_path", url, "--output_path", str(tmp_path / "begun"), "--init_from", url)
    run.grug(*begun, "--stop_after", "1").expect(0, f"starts with the parameters of {url}/checkpoints/step-8")
    keys = Store(url).list("")
    files = {"loss.png", "log.txt", "metrics.jsonl", "profile/step-5/profile.txt", "run.json", "speedrun_results.json"}
    assert files <= set(keys)


@ONE_STORE
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


@pytest.mark.slow_faults
@pytest.mark.timeout(600)
def test_two_processes_of_one_run(server: ForkServer, bucket: Bucket, tmp_path: Path) -> None:
    """One of them is killed; both go on, and come to what two processes on a disk do. Then one reads all of it."""
    whole = server.run(tmp_path / "whole", base="eval")
    run = bucket_run(server, bucket, tmp_path / "run", base="eval")

    def start_both(which: Run | BucketRun, fault: str | None = None) -> list[Running]:
        return [
            which.start(fault, environment=environment, output=tmp_path / f"process-{index}.log")
            for index, environment in enumerate(two_environments())
        ]

    for process in start_both(whole):
        process.wait().expect(0)
    zero, one = start_both(run, "kill@step:5:1")
    one.wait().expect(-signal.SIGKILL)
    assert zero.wait().code != 0
    assert run.steps == [2, 4]
    for process in start_both(run):
        process.wait().expect(0)
    run.expect_equal(whole)
    assert run.leftovers() == []
    run.grug("eval", run.url).expect(0, "after 8 steps")
    run.fit(devices=4, command=("eval", run.url)).expect(0, "after 8 steps")


@pytest.mark.slow_faults
def test_a_run_on_ones_own_texts_and_tasks(server: ForkServer, bucket: Bucket, tmp_path: Path) -> None:
    """`grug train --text` with a bucket as output, stopped and started again; then a task of lm-eval."""
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(make_text(number, 5000))
    run = bucket_run(server, bucket, tmp_path / "run")

    def train(*more: str) -> Ended:
        words = ("train", "--text", "texts", "--output_path", run.url, "--trainer.num_train_steps", "6")
        return run.fit(command=(*words, *more), directory=tmp_path)

    train("--stop_after", "3").expect(0, f"{run.url} is at step 3 of 6")
    train().expect(0, f"resuming from {run.url}/checkpoints/step-3.")
    task = write_rolling_task(tmp_path)
    run.grug("harness", run.url, "--tasks", str(task)).expect(0, "lm_eval/rolling/bits_per_byte")
    assert "harness/step-6-rolling.json" in Store(run.url).list("")
    assert not (tmp_path / "runs" / run.url.rpartition("/")[2]).exists()
