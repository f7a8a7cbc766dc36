import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grug_native.host.run_folder import (
    RunLock,
    RunLockedError,
    check_disk,
    committed_steps,
    discard,
    find_checkpoint,
    local_path,
    run_folder,
    saving_name,
    set_aside,
    sweep_leftovers,
    validate_run_id,
)

BAD_RUN_IDS = [
    "",
    ".",
    "..",
    "../x",
    "/abs",
    "a/b",
    "a\0b",
    "%2e%2e",
    ".hidden",
    "-dash",
    "a" * 181,
    "é" * 91,
    " a",
    "a ",
    "a\n",
    "a\x1b[0m",
]


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text("content")
    return path


@pytest.mark.parametrize("run_id", BAD_RUN_IDS)
def test_an_unsafe_run_id_is_refused(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_id="):
        validate_run_id(run_id)
    with pytest.raises(ValueError, match="run_id="):
        run_folder(tmp_path, run_id)


@pytest.mark.parametrize("run_id", ["日本語", "中文", "हिन्दी", "a b", "é" * 90, "_x", "v1.2"])
def test_a_run_may_be_called_in_any_script(run_id: str, tmp_path: Path) -> None:
    assert run_folder(tmp_path, validate_run_id(run_id)) == tmp_path / run_id
    # The longest name that is made of it still is one of a file.
    make_folder(tmp_path / f"{saving_name(run_id, 10**9)}.orbax-checkpoint-tmp-{10**12}")
    assert len(sweep_leftovers(tmp_path, run_id)) == 1


@given(st.text())
def test_an_accepted_run_id_is_one_name_below_its_base(run_id: str) -> None:
    base = Path("/nowhere/runs")
    try:
        folder = run_folder(base, run_id)
    except ValueError:
        return
    assert folder.parent == base and folder.name == run_id


def test_a_link_cannot_lead_a_run_out_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "me").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="outside of"):
        run_folder(tmp_path / "runs", "me")


@pytest.mark.parametrize("output_path", ["", "gs://bucket/run", "a\0b"])
def test_an_output_path_must_be_of_this_machine(output_path: str) -> None:
    with pytest.raises(ValueError, match="output_path="):
        local_path(output_path)


def test_only_real_folders_with_something_in_them_are_checkpoints(tmp_path: Path) -> None:
    for step in (9, 10, 1000, 999):
        make_folder(tmp_path / f"step-{step}")
    (tmp_path / "step-99").mkdir()
    (tmp_path / "step-97").write_text("a file")
    (tmp_path / "step-98").symlink_to("/")
    for name in ("step-01", "step--1", "step-٣", "step-12.orbax-checkpoint-tmp", "xstep-4", ".corrupt-step-5"):
        make_folder(tmp_path / name)
    assert committed_steps(tmp_path) == [1000, 999, 10, 9]
    assert committed_steps(tmp_path / "missing") == []


def test_a_missing_checkpoint_is_answered_with_the_newest_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint: train the run first"):
        find_checkpoint(tmp_path, None)
    for step in range(2, 30, 2):
        make_folder(tmp_path / f"step-{step}")
    assert find_checkpoint(tmp_path, None).name == "step-28"
    with pytest.raises(ValueError, match=r"no checkpoint of step 3: there are 28, 26, .*, 10 and 4 older ones$"):
        find_checkpoint(tmp_path, 3)


def test_setting_aside_never_overwrites(tmp_path: Path) -> None:
    aside = [set_aside(make_folder(tmp_path / "step-3"), "corrupt").name for _ in range(3)]
    assert aside == [".corrupt-step-3", ".corrupt-step-3-2", ".corrupt-step-3-3"]
    assert all((tmp_path / name / "file").read_text() == "content" for name in aside)


def test_discarding_leaves_nothing_and_follows_no_link(tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside")
    step = make_folder(tmp_path / "checkpoints" / "step-4")
    (step / "link").symlink_to(outside)
    discard(step, "me")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert (outside / "file").exists()


def test_sweeping_removes_this_run_s_leftovers_and_nothing_else(tmp_path: Path) -> None:
    ours = [".saving-me-step-3", ".saving-me-step-4.orbax-checkpoint-tmp", ".trash-me-step-10"]
    others = [".saving-you-step-3", ".trash-me-step-x", ".saving-me-step-3-extra", "step-3", ".corrupt-step-3", "notes"]
    others += [".saving-me-2-step-3", ".abandoned-step-9"]
    for name in ours + others:
        make_folder(tmp_path / name)
    outside = make_folder(tmp_path / "outside")
    (tmp_path / ".trash-me-step-11").symlink_to(outside)
    assert sweep_leftovers(tmp_path, "me") == sorted(ours)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "outside", ".trash-me-step-11"} and (outside / "file").exists()


def test_a_full_or_unwritable_disk_is_found_at_once(tmp_path: Path) -> None:
    check_disk(tmp_path, 1000, kept=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="free some space") as full:
        check_disk(tmp_path, 10**18, kept=2)
    assert full.value.errno == errno.ENOSPC
    # What is kept and is there already needs no room; the next one does.
    size = int(shutil.disk_usage(tmp_path).free / 2)
    with pytest.raises(OSError, match=r"and 2\.2 checkpoints need"):
        check_disk(tmp_path, size, kept=1)
    make_folder(tmp_path / "step-3")
    check_disk(tmp_path, size, kept=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write checkpoints"):
        check_disk(tmp_path / "file", 1000, kept=2)


def test_the_second_writer_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "first")
    with pytest.raises(RunLockedError, match=rf'"run_id": "first", "pid": {os.getpid()}'):
        RunLock(tmp_path, "second")
    lock.release()
    RunLock(tmp_path, "second").release()


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from grug_native.host.run_folder import RunLock
lock = RunLock(Path({str(tmp_path)!r}), "child")
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "locked\n"
        with pytest.raises(RunLockedError, match=f'"pid": {child.pid}'):
            RunLock(tmp_path, "parent")
        child.send_signal(signal.SIGKILL)
    RunLock(tmp_path, "parent").release()
