"""The kill soak: `python -m tests.faults.soak`.

One small run is killed with SIGKILL at random moments: half of them at any time from the start of the process on (while
it restores, opens its data, compiles), half while it trains and saves. Nothing is repaired in between. Then it is left
to end, and must have written, step by step and bit by bit, what a run that nobody disturbed has written.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from grug_native.tracking.jsonl import METRICS_FILE
from tests.bucket.runs import BucketRun
from tests.bucket.servers import Bucket
from tests.faults.runs import ForkServer, Run

STEPS_PER_PERMANENT = 250
HALF = 2
"""Folders that a kill may leave beside those that are kept: one half-written, one half-deleted."""

TRAINING = "first step after"
"""What a process says once it trains."""


@dataclass(frozen=True)
class Soaked:
    """What happened."""

    kills: int
    """Processes killed."""
    in_training: int
    """Of these, after the process had logged a step."""
    resumed: int
    """Different steps that processes began at."""
    replayed: int
    """Steps that were logged, and lost to a kill."""
    most_folders: int
    """Checkpoint folders at once, permanent, temporary, half-written and half-deleted ones."""
    most_bytes: int
    """Size of the run's folder at its largest."""
    checkpoint_bytes: int
    """Size of one checkpoint."""
    seconds: float
    """How long it took, without the undisturbed run."""


def soak(server: ForkServer, folder: Path, *, kills: int, steps: int, keep_last: int = 2, seed: int = 0) -> Soaked:
    """Runs one config twice, once undisturbed.

    Raises:
        AssertionError: the two differ, a checkpoint was lost, the disk use grew, or a process did not come up again.
    """
    changes = {
        "trainer.num_train_steps": steps,
        "trainer.steps_per_checkpoint": STEPS_PER_PERMANENT,
        "trainer.minutes_per_temporary_checkpoint": 0.2 / 60,
        "trainer.keep_last_checkpoints": keep_last,
    }
    whole = server.run(folder / "whole", changes)
    whole.fit().expect(0)
    run, rng = server.run(folder / "run", changes), random.Random(seed)
    permanent = set(range(STEPS_PER_PERMANENT, steps + 1, STEPS_PER_PERMANENT))
    in_training = replayed = most_folders = most_bytes = 0
    starts, logged, started = set[int](), 0, time.monotonic()
    for kill in range(kills):
        before = run.steps[0] if run.checkpoints.exists() and run.steps else 0
        starts.add(before)
        replayed += logged - min(before, logged)
        # It never comes to its end before its time.
        process = run.start(f"sleep@step:{steps - 1}")
        if kill % 2:
            process.until_said(TRAINING)
            time.sleep(rng.uniform(0, 2))
        else:
            time.sleep(rng.uniform(0, 4))
        process.send(signal.SIGKILL)
        in_training += TRAINING in process.wait().expect(-signal.SIGKILL)
        if not run.checkpoints.exists():
            continue
        newest = run.steps[0] if run.steps else 0
        assert newest >= before, f"step {before} was lost"
        assert {step for step in permanent if step <= newest} <= set(run.steps)
        logged = max((int(str(row[0])) + 1 for row in run.record()), default=0) if log_exists(run) else 0
        most_folders = max(most_folders, len(run.names()))
        most_bytes = max(most_bytes, run.size())
        assert len(run.names()) <= len([step for step in permanent if step <= newest]) + keep_last + HALF
    seconds = time.monotonic() - started
    run.fit().expect(0)
    run.expect_equal(whole)
    for step in permanent:
        assert step in run.steps
    assert len(run.names()) <= len(permanent) + keep_last - 1
    checkpoint = sum(path.stat().st_size for path in run.step(steps).rglob("*") if path.is_file())
    return Soaked(kills, in_training, len(starts), replayed, most_folders, most_bytes, checkpoint, seconds)


def soak_bucket(
    server: ForkServer, url: str, folder: Path, *, kills: int, steps: int, seed: int = 0, bucket: Bucket | None = None
) -> str:
    """As `soak`, with the killed run in a bucket, to which `bucket` or the environment leads.

    Returns:
        What happened, in words.

    Raises:
        AssertionError: the two runs differ, a checkpoint was lost, or a process did not come up again.
    """
    changes = {
        "trainer.num_train_steps": steps,
        "trainer.steps_per_checkpoint": max(steps // 6, 1),
        "trainer.minutes_per_temporary_checkpoint": 0.2 / 60,
    }
    whole = server.run(folder / "whole", changes)
    whole.fit().expect(0)
    run = BucketRun(url, bucket, server.run(folder / "run", changes | {"output_path": url}))
    assert run.steps == [], f"{url} holds a run: give a folder that is free"
    rng, started, in_training, starts = random.Random(seed), time.monotonic(), 0, set[int]()
    for kill in range(kills):
        before = max(run.steps, default=0)
        starts.add(before)
        process = run.start(f"sleep@step:{steps - 1}")
        if kill % 2:
            process.until_said(TRAINING)
        time.sleep(rng.uniform(0, 3))
        process.send(signal.SIGKILL)
        in_training += TRAINING in process.wait().expect(-signal.SIGKILL)
        assert max(run.steps, default=0) >= before, f"step {before} was lost"
    seconds = time.monotonic() - started
    run.fit().expect(0)
    run.expect_equal(whole)
    assert run.leftovers() == []
    return (
        f"{kills} SIGKILLs in {seconds:.0f} s, {in_training} of them while the run trained\n"
        f"resumed from {len(starts)} different steps; record and state are those of an undisturbed run on a disk"
    )


def log_exists(run: Run) -> bool:
    """Whether a process has got as far as to open the log."""
    return (run.folder / METRICS_FILE).exists()


def main() -> None:
    """Prints what happened; ends with an error if the promise was not kept."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="URL", help="put the killed run there: gs://... or s3://..., a free folder")
    arguments = parser.parse_args()
    # Killed processes leave semaphores behind, which Python's tracker of them removes, and tells of.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    with tempfile.TemporaryDirectory() as folder:
        server = ForkServer(Path(folder) / "server")
        if arguments.output is not None:
            given = {"kills": arguments.kills, "steps": arguments.steps, "seed": arguments.seed}
            print(soak_bucket(server, arguments.output, Path(folder), **given))
            return
        found = soak(server, Path(folder), kills=arguments.kills, steps=arguments.steps, seed=arguments.seed)
    print(f"{found.kills} SIGKILLs in {found.seconds:.0f} s, {found.in_training} of them while the run trained")
    print(f"resumed from {found.resumed} different steps; {found.replayed} logged steps were lost and done again")
    print(f"at most {found.most_folders} checkpoint folders and {found.most_bytes / 1e6:.1f} MB", end="")
    print(f" (a checkpoint has {found.checkpoint_bytes / 1e6:.1f} MB)")
    print(f"all {arguments.steps} steps and the final state equal those of the undisturbed run, byte for byte")


if __name__ == "__main__":
    sys.exit(main())
