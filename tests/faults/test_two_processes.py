"""F18 to F22: two processes under jax.distributed on loopback, and a fault in one of them."""

import signal
import time
from pathlib import Path

import pytest

from grug_native.tracking.jsonl import METRICS_FILE, read_metrics
from tests.faults.runs import NUM_STEPS, ForkServer, Run, Running, two_environments
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import assert_close, loss_terms

pytestmark = [pytest.mark.slow_faults, pytest.mark.timeout(600)]

STEPS = {
    "trainer.num_train_steps": 40,
    "trainer.steps_per_checkpoint": 20,
    "trainer.minutes_per_temporary_checkpoint": 1e-9,
}
"""Checkpoints after 10 steps by the clock of process 0, after 20 by the number, and so on."""


def start_both(run: Run, fault: str | None = None, *, other: Run | None = None) -> tuple[Running, Running]:
    """Starts processes 0 and 1 of a run, the second in the folder of `other`; the first one is the coordinator."""
    zero, one = (
        side.start(
            fault,
            environment=environment,
            output=run.folder.with_name(f"{run.folder.name}-{environment['JAX_PROCESS_ID']}.log"),
        )
        for side, environment in zip((run, other or run), two_environments(), strict=True)
    )
    return zero, one


def fit_both(run: Run) -> None:
    for process in start_both(run):
        process.wait(300).expect(0)


@pytest.fixture(scope="module")
def both(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of two processes."""
    run = server.run(tmp_path_factory.mktemp("both") / "run", STEPS)
    fit_both(run)
    return run


@pytest.fixture
def pair(server: ForkServer, tmp_path: Path) -> Run:
    """A run as `both`, not started."""
    return server.run(tmp_path / "run", STEPS)


@pytest.mark.parametrize("victim", [0, 1])
def test_f19_one_of_two_is_killed(victim: int, pair: Run, both: Run) -> None:
    processes = start_both(pair, f"kill@step:19:{victim}")
    processes[victim].wait(300).expect(-signal.SIGKILL)
    started = time.monotonic()
    survivor = processes[1 - victim].wait(100)
    print(f"the survivor ended with {survivor.code} after {time.monotonic() - started:.1f} s")
    assert survivor.code != 0 and time.monotonic() - started < 30
    assert pair.steps == [10]
    fit_both(pair)
    pair.expect_equal(both)


@pytest.mark.parametrize("told", [0, 1])
def test_f20_one_of_two_is_told_to_stop(told: int, pair: Run, both: Run) -> None:
    for process in start_both(pair, f"term@step:15:{told}"):
        process.wait(300).expect(143)
    assert 15 < pair.steps[0] < 40
    fit_both(pair)
    assert pair.record() == both.record() and pair.digests() == both.digests()


def test_f20_one_of_two_is_told_to_stop_while_both_evaluate(server: ForkServer, tmp_path: Path) -> None:
    run = server.run(tmp_path / "run", {"eval.max_eval_batches": None}, base="eval")
    for process in start_both(run, "term@eval:2:1"):
        process.wait(300).expect(143)
    assert run.steps[0] < NUM_STEPS
    fit_both(run)
    rows = read_metrics(run.folder / METRICS_FILE)
    assert [row["step"] for row in rows if "eval/ema/loss" in row] == [0, 2, 4, 6, 8]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(NUM_STEPS))


def test_f18_two_processes_become_one_with_two_devices(pair: Run, both: Run) -> None:
    for process in start_both(pair, "term@step:15:0"):
        process.wait(300).expect(143)
    newest = pair.step(pair.steps[0])
    pair.fit(devices=2).expect(0, f"resuming from {newest}")
    rows, wanted = (read_metrics(run.folder / METRICS_FILE) for run in (pair, both))
    assert [row["data/batch_digest"] for row in rows] == [row["data/batch_digest"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert_close(row["train/loss"], other["train/loss"], terms=len(rows) * loss_terms(SMALL_MODEL, 4 * 32, 32))


@pytest.mark.parametrize("victim", [0, 1])
def test_f21_one_of_two_hangs(victim: int, pair: Run, both: Run) -> None:
    processes = start_both(pair, f"stop@step:15:{victim}")
    started = time.monotonic()
    try:
        survivor = processes[1 - victim].wait(300)
    finally:
        processes[victim].send(signal.SIGKILL)
    print(f"the survivor ended with {survivor.code} after {time.monotonic() - started:.1f} s")
    assert survivor.code != 0
    processes[victim].wait(30)
    fit_both(pair)
    pair.expect_equal(both)


@pytest.mark.parametrize("fault", ["raise@mid_write:20:1", "enospc@pre_commit:20:0", "raise@data:25:1"])
def test_f22_one_of_two_fails_while_the_other_trains_or_saves(fault: str, pair: Run, both: Run) -> None:
    for process in start_both(pair, fault):
        assert process.wait(300).code != 0
    assert pair.steps[0] in (10, 20) and pair.digests()
    fit_both(pair)
    pair.expect_equal(both)


def test_f22_an_evaluation_fails_on_one_of_two(server: ForkServer, tmp_path: Path) -> None:
    run = server.run(tmp_path / "run", base="eval")
    for process in start_both(run, "raise@eval:4:1"):
        assert process.wait(100).code != 0
    fit_both(run)
    rows = read_metrics(run.folder / METRICS_FILE)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 4, 6, 8]


def test_f22_one_of_two_does_not_see_the_disk(server: ForkServer, pair: Run, both: Run, tmp_path: Path) -> None:
    """It may be a mount that failed: no reason to set sound checkpoints aside."""
    shared = server.copy(both, tmp_path / "shared")
    zero, one = start_both(shared, other=pair)
    zero.wait(300).expect(1, "process 1 cannot read", "on a disk that all processes share")
    one.wait(300).expect(1, "process 0 can read", "on a disk that all processes share")
    assert shared.names() == both.names()
