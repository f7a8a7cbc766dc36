"""F7, F23, F24, F26, F28 to F30, F32, F37: what goes wrong while a run trains, evaluates, saves or tells of it."""

import math
import os
import signal
from pathlib import Path

import pytest

from grug_native.tracking.jsonl import METRICS_FILE, read_metrics
from tests.faults.runs import NUM_STEPS, ForkServer, Run


def test_f07_a_file_that_may_not_grow(half: Run, whole: Run) -> None:
    half.fit(largest_file=60_000).expect(1, "File too large")
    assert half.steps == [5, 4, 2] and half.digests()
    half.fit().expect(0)
    half.expect_equal(whole)
    assert half.names() == whole.names()


def test_f07_f23_f26_f37_what_fails_in_a_save_a_step_or_the_data_costs_no_step(run: Run, whole: Run) -> None:
    for fault in ("memory@pre_save:4", "memory@mid_write:4", "enospc@pre_commit:4"):
        run.fit(fault).expect(1, f"{fault} struck")
        assert run.names() == ["step-2"]
    words = (
        "step 3 is not finite",
        "gradient norm nan",
        "sequences 12 to 15",
        str(run.step(2)),
        "--trainer.nonfinite=skip",
    )
    run.fit("nan@step:3").expect(1, *words)
    assert run.names() == ["step-2"]
    run.fit("raise@fetch:5").expect(1, "InjectedFaultError: raise@fetch:5 struck")
    assert run.steps == [5, 4, 2]
    run.fit(f"nan@step:{NUM_STEPS - 1}").expect(1, f"step {NUM_STEPS - 1} is not finite")
    assert run.steps[0] == 6
    run.fit().expect(0)
    run.expect_equal(whole)


def test_f23_skipped_steps_are_counted_and_the_resume_is_exact(server: ForkServer, run: Run, whole: Run) -> None:
    settings = {"trainer.nonfinite": "skip", "trainer.max_skipped_steps": 2}
    once = run.edit(settings)
    once.fit("nan@step:3").expect(0, "skipped (1 of at most 2)")
    rows = read_metrics(once.folder / METRICS_FILE)
    assert [row["train/skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [math.isnan(float(row["grad/norm/total"])) for row in rows] == [row["step"] == 3 for row in rows]
    assert [row[2] for row in once.record()] == [row[2] for row in whole.record()]
    again = server.run(run.folder.with_name("again"), settings)
    again.fit("nan@step:3,kill@step:5").expect(-signal.SIGKILL)
    again.fit("nan@step:3").expect(0)
    again.expect_equal(once)
    assert [row["train/skipped_steps"] for row in read_metrics(again.folder / METRICS_FILE)] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_f23_the_bound_of_skipped_steps_is_that_of_the_whole_run(run: Run) -> None:
    run.edit({"trainer.nonfinite": "skip", "trainer.max_skipped_steps": 2})
    run.fit("nan@step:*").expect(1, "step 2 is not finite", "raise trainer.max_skipped_steps=2")
    assert run.steps == [2] and run.metadata(2).skipped_steps == 2
    run.fit("nan@step:3", resume_step=0, stop_after=5).expect(0, "skipped (1 of at most 2)")
    assert run.metadata(5).skipped_steps == 1
    run.fit("nan@step:5,nan@step:7").expect(1, "skipped (2 of at most 2)", "step 7 is not finite", "the whole run")
    assert run.steps[0] == 6 and run.metadata(6).skipped_steps == 2


def test_f24_a_spike_is_told_and_the_resume_is_exact(server: ForkServer, run: Run) -> None:
    changes = {"optimizer.learning_rate": 1.0, "optimizer.schedule.warmup": 0}
    once = run.edit(changes)
    once.fit().expect(0)
    rows = read_metrics(once.folder / METRICS_FILE)
    assert max(float(row["train/loss"]) for row in rows) > 2 * float(rows[0]["train/loss"])
    assert all(math.isfinite(float(row["grad/norm/total"])) for row in rows)
    again = server.run(run.folder.with_name("again"), changes)
    again.fit("kill@step:5").expect(-signal.SIGKILL)
    again.fit().expect(0)
    again.expect_equal(once)


def test_f28_a_tracker_that_cannot_start(run: Run, whole: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    run.edit({"trainer.trackers": [{"type": "tensorboard", "logdir": str(tmp_path / "file" / "logs")}]})
    run.fit().expect(0, "TensorboardConfig could not start, the run goes on without it")
    run.expect_equal(whole)


def test_f29_evaluations_that_fail_cost_the_run_nothing(server: ForkServer, run: Run, whole_eval: Run) -> None:
    run = server.run(run.folder, base="eval")
    run.fit("raise@eval:2,memory@eval:4").expect(1, "EvaluationError", "2 evaluation(s) failed", "memory@eval:4")
    wanted = [(*row[:-1], [] if row[0] in (2, 4) else row[-1]) for row in whole_eval.record()]
    assert run.record() == wanted and run.digests() == whole_eval.digests()
    run.fit().expect(0)


def test_f30_a_checkpoint_beside_an_evaluation_of_the_average(server: ForkServer, run: Run, whole_eval: Run) -> None:
    run = server.run(run.folder, base="eval")
    run.fit("kill@eval:4").expect(-signal.SIGKILL)
    run.fit().expect(0)
    run.expect_equal(whole_eval)


@pytest.mark.parametrize("kind", ["garbage", "unwritable"])
def test_f32_a_bad_cache_of_compiled_programs(kind: str, run: Run, whole: Run, tmp_path: Path) -> None:
    cache = tmp_path / "programs"
    if kind == "garbage":
        cache.mkdir()
        for program in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"):
            (cache / program.name).write_bytes(b"garbage")
    else:
        cache.write_text("not a folder")
    run.fit(xla_cache=cache).expect(0)
    run.expect_equal(whole)
