"""F1 to F5, F14, F27, F35: processes that end when they should not, or are asked to, or are two."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grug_native.host.run_folder import committed_steps
from tests.faults.runs import DEADLINE, NUM_STEPS, ForkServer, Run
from tests.faults.soak import soak

KILL_POINTS = "compile:0 data:3 step:3 log:3 pre_save:4 after_d2h:4 mid_write:4 pre_commit:4 post_commit:4 fetch:5"
TEMPORARY = {
    "trainer.minutes_per_temporary_checkpoint": 1e-9,
    "trainer.steps_per_checkpoint": 3,
    "trainer.keep_last_checkpoints": 1,
}
"""Beside the permanent ones, a temporary checkpoint whenever the one before is done, which it replaces."""


def test_f02_sigkill_at_each_point(run: Run, whole: Run) -> None:
    """One run: each process goes on from what the one before has left, and is killed a point later; the last is not."""
    for fault, code in [*((f"kill@{point}", -signal.SIGKILL) for point in KILL_POINTS.split()), (None, 0)]:
        before = run.steps
        run.fit(fault).expect(code, f"resuming from {run.step(before[0])}" if before else "starting from scratch")
    run.expect_equal(whole)
    assert run.names() == whole.names()


@pytest.mark.slow_faults
@pytest.mark.timeout(600)
def test_f01_sigkill_at_random_moments(server: ForkServer, tmp_path: Path) -> None:
    """The soak with but one checkpoint kept; by hand it runs with the default of two."""
    assert soak(server, tmp_path, kills=25, steps=1000, keep_last=1, seed=1).resumed > 5


def test_f03_a_signal_saves_at_the_next_boundary(run: Run, whole: Run) -> None:
    """One run: each process goes on from what the one before has saved; a closed terminal is a signal too.

    A file is written beside the next steps, so only data that stay away tell how far these get.
    """
    for fault, code, reached in [
        ("hup@step:0", 129, 1),
        ("term@data:1", 143, 2),
        ("int@step:2", 130, 3),
        ("term@pre_save:4", 143, 5),
        ("term@mid_write:6,sleep@fetch:7", 143, 6),
        ("term@mid_write:8", 143, 8),
    ]:
        said = run.fit(fault).expect(code)
        assert run.steps[0] >= reached
        assert "SIGHUP: saving at the next step" in said or not fault.startswith("hup")
    run.fit().expect(0)
    assert run.record() == whole.record() and run.digests() == whole.digests()


def test_f03_a_signal_during_an_evaluation(server: ForkServer, whole_eval: Run, run: Run) -> None:
    run = server.run(run.folder, base="eval")
    run.fit("term@eval:2").expect(143)
    assert run.steps == [2]
    run.fit().expect(0)
    assert run.record() == whole_eval.record() and run.digests() == whole_eval.digests()


def test_f03_ctrl_c_in_ipython_gives_the_state_back(run: Run, whole: Run) -> None:
    lines = ["state = runner.fit()", "print('stopped after', int(state.step))", "state = runner.fit()"]
    run.fit("int@step:3", cell="\n".join([*lines, "print('done after', int(state.step))"])).expect(
        0, "stopped after 4\n", f"resuming from {run.step(4)}", f"done after {NUM_STEPS}\n"
    )
    run.expect_equal(whole)


def test_f27_a_signal_while_the_data_hang(run: Run, whole: Run) -> None:
    process = run.start("sleep@fetch:5")
    process.until(lambda: 4 in committed_steps(run.checkpoints))
    process.send(signal.SIGTERM)
    process.wait(30).expect(143)
    assert run.steps[0] == 5
    run.fit().expect(0)
    assert run.record() == whole.record() and run.digests() == whole.digests()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f04_the_second_signal_ends_it_at_once(number: signal.Signals, run: Run, whole: Run) -> None:
    process = run.start(f"{'term' if number == signal.SIGTERM else 'int'}@step:3,sleep@mid_write:4")
    process.until(lambda: list(run.checkpoints.glob(".saving-run-step-4*")))
    time.sleep(1.2)  # What comes sooner passes for the first one again.
    process.send(number)
    process.wait(10).expect(128 + number)
    assert run.steps == [2]
    run.fit().expect(0)
    run.expect_equal(whole)
    assert run.names() == whole.names()


def test_f05_an_error_in_the_loop_comes_after_the_save_under_way(run: Run, whole: Run) -> None:
    said = run.fit("raise@step:4").expect(1, "InjectedFaultError: raise@step:4 struck at step, step 4")
    assert said.index("Traceback") == said.rindex("Traceback")
    assert run.steps == [4, 2]
    run.fit().expect(0)
    run.expect_equal(whole)


def test_f05_a_process_that_ends_right_after_its_last_save(run: Run) -> None:
    """Not a fork, but the interpreter's own way to its end."""
    code = "import sys; from pathlib import Path; from grug_native.config import load_config;"
    code += "from grug_native.runner import GrugRunner; GrugRunner(load_config(Path(sys.argv[1]))).fit(stop_after=1)"
    command = [sys.executable, "-c", code, str(run.config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 0, ended.stderr
    assert run.names() == ["step-1"] and run.digests()


def test_f14_a_second_process_is_refused_until_the_first_is_gone(run: Run, whole: Run) -> None:
    first = run.start("sleep@step:3")
    first.until(lambda: 2 in committed_steps(run.checkpoints))
    run.fit().expect(4, f'"pid": {first.pid}', "give another output_path")
    first.send(signal.SIGKILL)
    first.wait().expect(-signal.SIGKILL)
    run.fit().expect(0)
    run.expect_equal(whole)


def test_f35_permanents_and_the_newest_survive_any_sequence_of_kills(run: Run, whole: Run) -> None:
    run.edit(TEMPORARY)
    due = {3, 6}
    run.fit("kill@mid_gc:*").expect(-signal.SIGKILL)
    # At which steps temporary ones are saved is a matter of time, so the last of these may come too late.
    for fault in ("kill@step:5", "kill@post_commit:*", "kill@mid_write:*", "kill@pre_commit:*"):
        before = run.steps
        assert run.fit(fault).code in (0, -signal.SIGKILL)
        assert run.steps[:1] >= before[:1]
        assert {step for step in due if run.steps and step < run.steps[0]} <= set(run.steps)
        assert len(set(run.steps) - due) <= 2
    run.fit().expect(0)
    assert run.names() == ["step-3", "step-6", f"step-{NUM_STEPS}"]
    run.expect_equal(whole)
