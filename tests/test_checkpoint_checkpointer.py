import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_native.checkpoint.checkpointer import CheckpointPolicy, GrugCheckpointer
from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointMismatchError,
    NoUsableCheckpointError,
    read_metadata,
)
from grug_native.host.fault_injection import ENV_NAME, InjectedFaultError
from grug_native.host.run_folder import RunLockedError, committed_steps
from tests.small_state import IDENTITY, SmallState, make_checkpointer, make_state, save_step, state_shape


def fresh() -> SmallState:
    return make_state(0)


def no_fresh_start() -> SmallState:
    raise AssertionError("a run that has checkpoints was started from scratch")


def save(checkpointer: GrugCheckpointer, step: int, *, temporary: bool = False) -> None:
    start = checkpointer.save_temporary_checkpoint if temporary else checkpointer.save_step_checkpoint
    start(make_state(step), step=step, data_offset=8 * step)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path) as checkpointer:
        checkpointer.preflight(state_shape())
        first = checkpointer.restore_latest_or_initialize(fresh, state_shape())
        assert first.metadata is None and int(first.state.step) == 0
        save(checkpointer, 5)
        save(checkpointer, 10)
    with make_checkpointer(tmp_path) as checkpointer:
        resumed = checkpointer.restore_latest_or_initialize(no_fresh_start, state_shape())
        assert eqx.tree_equal(resumed.state, make_state(10))
        assert resumed.metadata is not None
        assert (resumed.metadata.data_offset, resumed.metadata.kind, resumed.metadata.config) == (
            80,
            "permanent",
            IDENTITY.config,
        )
        assert eqx.tree_equal(checkpointer.restore(state_shape(), step=5).state, make_state(5))
        with pytest.raises(ValueError, match=r"no checkpoint of step 6: there are 10, 5"):
            checkpointer.restore(state_shape(), step=6)
    assert names(tmp_path) == ["step-10", "step-5"]


def test_temporary_ones_go_once_a_newer_one_is_there(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 8, temporary=True)
        save(checkpointer, 9, temporary=True)
        checkpointer.wait()
        assert names(tmp_path) == ["step-9"]
        save(checkpointer, 10)
        save(checkpointer, 11, temporary=True)
    assert names(tmp_path) == ["step-10", "step-11"]


def test_a_temporary_one_becomes_permanent_when_that_is_due_at_its_step(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 9, temporary=True)
        save(checkpointer, 9)
        save(checkpointer, 9, temporary=True)
        save(checkpointer, 10, temporary=True)
    assert names(tmp_path) == ["step-10", "step-9"]
    assert read_metadata(tmp_path / "checkpoints" / "step-9").kind == "permanent"


def test_another_state_of_a_step_that_is_there_is_refused(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 9)
        save(checkpointer, 9)
        other = eqx.tree_at(lambda state: state.params.bias, make_state(9), replace_fn=lambda bias: bias + 1)
        with pytest.raises(CheckpointError, match=r"step-9 holds another state of this step \(params\.bias differ\)"):
            checkpointer.save_step_checkpoint(other, step=9, data_offset=72)
        assert eqx.tree_equal(checkpointer.restore(state_shape(), step=9).state, make_state(9))


@settings(max_examples=12, deadline=None)
@given(
    keep_last=st.integers(1, 3),
    saves=st.lists(st.tuples(st.integers(1, 900), st.booleans(), st.booleans()), min_size=1, max_size=7),
)
def test_what_is_kept(
    keep_last: int, saves: list[tuple[int, bool, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Over any sequence of saves, failed saves and restarts: all permanents, the newest few, and little else."""
    run, step, sound, permanent = tmp_path_factory.mktemp("run"), 0, list[int](), set[int]()
    with pytest.MonkeyPatch.context() as patch:
        for gap, is_permanent, fails in saves:
            step += gap
            with make_checkpointer(run, keep_last=keep_last) as checkpointer:
                patch.setenv(ENV_NAME, f"raise@pre_commit:{step}" if fails else "nan@eval:0")
                save(checkpointer, step, temporary=not is_permanent)
                if fails:
                    with pytest.raises(InjectedFaultError):
                        checkpointer.wait()
            if not fails:
                sound.append(step)
                permanent |= {step} if is_permanent else set()
            assert committed_steps(run / "checkpoints") == sorted({*sound[-keep_last:], *permanent}, reverse=True)
            sound = [s for s in sound if s in permanent or s in sound[-keep_last:]]


def test_a_failed_save_is_told_at_the_next_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_NAME, "enospc@pre_commit:2,enospc@pre_commit:3,raise@pre_commit:4")
    with make_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
        with pytest.raises(CheckpointError, match="pre_commit:2"):
            save(checkpointer, 3)
        checkpointer.check()
        save(checkpointer, 3)
        with pytest.raises(CheckpointError, match="pre_commit:3"):
            while True:
                checkpointer.check()
        checkpointer.wait()
        save(checkpointer, 4)
        with pytest.raises(InjectedFaultError):
            checkpointer.close()
        resumed = make_checkpointer(tmp_path)
        assert int(resumed.restore_latest_or_initialize(no_fresh_start, state_shape()).state.step) == 1
        resumed.close()


def test_the_first_error_is_the_one_that_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_NAME, "enospc@pre_commit:2")
    with pytest.raises(RuntimeError, match="the step failed") as error, make_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 2)
        raise RuntimeError("the step failed")
    assert "the save under way failed as well: CheckpointError" in error.value.__notes__[0]
    make_checkpointer(tmp_path).close()


def test_a_save_under_way_is_finished_when_the_loop_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the step failed"), make_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 2)
        raise RuntimeError("the step failed")
    assert names(tmp_path) == ["step-2"]


def test_one_writer(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path), pytest.raises(RunLockedError, match='"run_id": "small"'):
        make_checkpointer(tmp_path)
    make_checkpointer(tmp_path).close()


def test_leftovers_of_a_kill_are_removed_under_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_step(folder, 3)
    shutil.copytree(folder / "step-3", folder / ".trash-small-step-2")
    shutil.copytree(folder / "step-3", folder / ".saving-small-step-4.orbax-checkpoint-tmp")
    shutil.copytree(folder / "step-3", folder / ".saving-other-step-4")
    make_checkpointer(tmp_path).close()
    assert names(tmp_path) == [".saving-other-step-4", "step-3"]


def test_stepping_back(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path) as checkpointer:
        for step in (5, 9, 10):
            save(checkpointer, step)
        with pytest.raises(CheckpointError, match=r"rollback\(7\) first"):
            save(checkpointer, 7)
        with pytest.raises(ValueError, match=r"step=7 has no checkpoint .* \[10, 9, 5\]"):
            checkpointer.rollback(7)
        assert checkpointer.rollback(5) == [10, 9]
        save(checkpointer, 7)
        assert int(checkpointer.restore_latest_or_initialize(no_fresh_start, state_shape()).state.step) == 7
    assert names(tmp_path) == [".abandoned-step-10", ".abandoned-step-9", "step-5", "step-7"]
    with make_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.rollback(0) == [7, 5]
        assert checkpointer.restore_latest_or_initialize(fresh, state_shape()).metadata is None


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path) as checkpointer:
        (checkpointer.folder / "step-5").symlink_to(tmp_path)
        with pytest.raises(CheckpointError, match=r"step-5 is no checkpoint, and in the way: move it elsewhere"):
            save(checkpointer, 5)
        save(checkpointer, 6)
    assert names(tmp_path) == ["step-5", "step-6"]


def test_never_from_scratch_when_all_are_damaged(tmp_path: Path) -> None:
    path = save_step(tmp_path / "checkpoints", 3)
    shutil.rmtree(path / "train")
    for _ in range(2):
        with make_checkpointer(tmp_path) as checkpointer, pytest.raises(NoUsableCheckpointError):
            checkpointer.restore_latest_or_initialize(no_fresh_start, state_shape())


def test_a_copied_run_goes_on(tmp_path: Path) -> None:
    save_step(tmp_path / "run" / "checkpoints", 3)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with make_checkpointer(tmp_path / "run"), make_checkpointer(tmp_path / "copy") as copy:
        assert eqx.tree_equal(copy.restore_latest_or_initialize(no_fresh_start, state_shape()).state, make_state(3))


def test_another_run_s_checkpoints_are_neither_used_nor_deleted(tmp_path: Path) -> None:
    save_step(tmp_path / "checkpoints", 3)
    stranger = replace(IDENTITY, run_id="stranger")
    with GrugCheckpointer(tmp_path, stranger, CheckpointPolicy()) as checkpointer:
        with pytest.raises(CheckpointMismatchError, match="run_id: stored small, wanted stranger"):
            checkpointer.restore_latest_or_initialize(no_fresh_start, state_shape())
        save(checkpointer, 4)
    assert names(tmp_path) == ["step-3", "step-4"]


def test_a_changed_setting_is_refused_until_allowed_and_then_remembered(tmp_path: Path) -> None:
    save_step(tmp_path / "checkpoints", 3)
    changed = replace(IDENTITY, config={**IDENTITY.config, "optimizer": {"learning_rate": 0.5}})
    refused = pytest.raises(CheckpointMismatchError, match=r"stored 0\.001, wanted 0\.5")
    with GrugCheckpointer(tmp_path, changed, CheckpointPolicy()) as checkpointer, refused:
        checkpointer.restore_latest_or_initialize(no_fresh_start, state_shape())
    allowed = replace(changed, allowed_changes=("optimizer",))
    with GrugCheckpointer(tmp_path, allowed, CheckpointPolicy()) as checkpointer:
        checkpointer.restore_latest_or_initialize(no_fresh_start, state_shape())
        save(checkpointer, 4)
    lineage = read_metadata(tmp_path / "checkpoints" / "step-4").lineage
    assert lineage == ("step 3: optimizer.learning_rate: stored 0.001, wanted 0.5",)


def test_what_is_recorded_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "COOKIE"):
        monkeypatch.setenv(name, "canary-7f3a")
    with make_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)
    metadata = read_metadata(tmp_path / "checkpoints" / "step-1")
    assert metadata.environment["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert set(metadata.versions) >= {"jax", "orbax-checkpoint", "grug-native"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(b"canary-7f3a" in path.read_bytes() for path in files)


class Clock:
    """Seconds that only move when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_when_a_save_is_due(tmp_path: Path) -> None:
    clock = Clock()
    policy = CheckpointPolicy(steps_per_checkpoint=100, minutes_per_temporary_checkpoint=2.0)
    with GrugCheckpointer(tmp_path, IDENTITY, policy, clock=clock) as checkpointer:
        assert [step for step in range(1, 301) if checkpointer.due(step) == "permanent"] == [100, 200, 300]
        assert checkpointer.due(7) is None
        clock.now += 119
        assert checkpointer.due(8) is None
        clock.now += 2
        assert (checkpointer.due(9), checkpointer.due(100)) == ("temporary", "permanent")
        save(checkpointer, 9, temporary=True)
        checkpointer.wait()
        assert checkpointer.due(10) is None
        clock.now += 86_400
        assert checkpointer.due(11) == "temporary"
        clock.now -= 2 * 86_400
        assert checkpointer.due(12) is None
    silent = CheckpointPolicy(minutes_per_temporary_checkpoint=None)
    with GrugCheckpointer(tmp_path, IDENTITY, silent, clock=clock) as checkpointer:
        clock.now += 86_400
        assert checkpointer.due(100) is None


@pytest.mark.parametrize(
    "wrong", [{"steps_per_checkpoint": 0}, {"minutes_per_temporary_checkpoint": 0.0}, {"keep_last": 0}]
)
def test_a_policy_that_cannot_be_kept_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0"):
        CheckpointPolicy(**wrong)
