"""F9 to F13, F15, F31, F36: what a run finds on its disk is not what was left there."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from grug_native.checkpoint.metadata import METADATA_FILE, write_metadata
from grug_native.tracking.jsonl import METRICS_FILE
from tests.faults.runs import Run


def largest(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: Path, keep: int) -> None:
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "f09 half of the data": lambda path: cut(largest(path), largest(path).stat().st_size // 2),
    "f09 no data": lambda path: cut(largest(path), 0),
    "f10 a flipped bit": lambda path: flip(largest(path)),
    "f11 no metadata": lambda path: (path / METADATA_FILE).unlink(),
    "f11 an empty manifest": lambda path: cut(path / "train" / "manifest.ocdbt", 0),
    "f11 no array": lambda path: shutil.rmtree(path / "params"),
    "f13 half deleted": lambda path: [shutil.rmtree(path / "train"), (path / METADATA_FILE).unlink()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_f09_f10_f11_f13_a_damaged_newest_checkpoint(damage: Callable[[Path], object], half: Run, whole: Run) -> None:
    damage(half.step(5))
    half.fit().expect(0, "CHECKPOINT DAMAGED", ".corrupt-step-5", f"resuming from {half.step(4)}")
    half.expect_equal(whole)
    assert half.names() == [".corrupt-step-5", *whole.names()]


def test_f13_never_from_scratch(half: Run) -> None:
    for step in half.steps:
        flip(largest(half.step(step)))
    for _ in range(2):
        half.fit().expect(3, "refusing to start from scratch", ".corrupt-step-5")
    assert half.names() == [".corrupt-step-2", ".corrupt-step-4", ".corrupt-step-5"]
    half.fit(resume_step=0, stop_after=1).expect(0, "starting from scratch")
    assert half.names() == [f".abandoned-.corrupt-step-{step}" for step in (2, 4, 5)] + ["step-1"]


def test_f12_what_is_no_checkpoint_is_neither_used_nor_touched(half: Run, whole: Run, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("three years of work")
    strangers = [".saving-other-step-9", ".trash-run-step-x", "step-٣", "step-007", "step-98.orbax-checkpoint-tmp"]
    for name in strangers:
        shutil.copytree(half.step(2), half.checkpoints / name)
    (half.checkpoints / "step-99").mkdir()
    (half.checkpoints / "step-97").write_text("a file")
    for name in ("step-999", ".trash-run-step-9", ".saving-run-step-9"):
        (half.checkpoints / name).symlink_to(precious)
    found = half.names()
    half.fit().expect(0, f"resuming from {half.step(5)}")
    assert half.record() == whole.record()
    assert set(half.names()) == (set(found) | set(whole.names())) - {"step-5"}
    assert (precious / "thesis").read_text() == "three years of work"


def test_f15_f31_a_clock_that_was_wrong_and_a_log_that_is_torn_and_ahead_of_the_checkpoint(
    half: Run, whole: Run
) -> None:
    write_metadata(half.step(2), replace(half.metadata(2), saved_at="2999-01-01T00:00:00+00:00"))
    os.utime(half.step(2), (32_000_000_000, 32_000_000_000))
    os.utime(half.step(5), (0, 0))
    ahead = (whole.folder / METRICS_FILE).read_bytes().splitlines(keepends=True)[5:]
    with (half.folder / METRICS_FILE).open("ab") as file:
        file.write(b"".join(ahead)[:-9])
    half.fit().expect(0, f"resuming from {half.step(5)}")
    half.expect_equal(whole)


@pytest.mark.parametrize("version", [0, 2])
def test_f36_a_checkpoint_of_another_version(version: int, half: Run) -> None:
    write_metadata(half.step(5), replace(half.metadata(5), format_version=version))
    before = half.names()
    half.fit().expect(2, f"format_version={version}", "use the grug-native that wrote it")
    assert half.names() == before
