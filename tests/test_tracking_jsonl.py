"""The metrics file: whole lines, no step twice, nothing lost by a kill."""

import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grug_native.tracking.jsonl import JsonlTracker, Metric, MetricRow, build_trackers, read_metrics

LOSSES = st.lists(st.floats(allow_nan=False), min_size=1, max_size=8)


def write(path: Path, losses: list[float], *, start: int = 0) -> None:
    tracker = JsonlTracker(path)
    for step, loss in enumerate(losses, start):
        tracker.log({"train/loss": loss}, step=step)
    tracker.close()


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


@given(LOSSES)
def test_rows_come_back_and_every_line_is_json(losses: list[float]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "metrics.jsonl")
        write(path, losses)
        assert read_metrics(path) == [{"step": i, "train/loss": loss} for i, loss in enumerate(losses)]
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)


@given(losses=LOSSES, cut=st.integers(min_value=0, max_value=400), resume_at=st.integers(min_value=0, max_value=9))
def test_a_run_killed_anywhere_and_resumed_logs_what_an_unbroken_one_does(
    losses: list[float], cut: int, resume_at: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        whole, broken = Path(directory, "whole.jsonl"), Path(directory, "broken.jsonl")
        write(whole, losses)
        broken.write_bytes(whole.read_bytes()[:cut])
        survivors = read_metrics(broken)
        assert survivors == read_metrics(whole)[: len(survivors)]

        resume_at = min(resume_at, len(survivors))
        tracker = JsonlTracker(broken)
        tracker.truncate_to(resume_at)
        for step in range(resume_at, len(losses)):
            tracker.log({"train/loss": losses[step]}, step=step)
        tracker.close()
        assert broken.read_bytes() == whole.read_bytes()


def test_opening_a_file_with_a_torn_or_zeroed_tail_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    for tail in (b'{"step": 2, "train/lo', b"\0\0\0\0"):
        path = tmp_path / f"{len(tail)}.jsonl"
        write(path, [1.0, 2.0])
        path.write_bytes(path.read_bytes() + tail)
        write(path, [3.0], start=2)
        assert [row["train/loss"] for row in read_metrics(path)] == [1.0, 2.0, 3.0]


def test_not_finite_numbers_come_back_here_and_in_pandas(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1.5, math.inf, -math.inf, math.nan])
    expected = np.array([1.5, math.inf, -math.inf, math.nan])
    np.testing.assert_array_equal([float(row["train/loss"]) for row in read_metrics(path)], expected)
    frame = pd.read_json(path, lines=True)
    np.testing.assert_array_equal(frame["train/loss"].to_numpy(dtype=float), expected)


def test_a_line_is_in_the_file_once_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"train/loss": 1.0}, step=0)
    assert path.read_text() == '{"step": 0, "train/loss": 1.0}\n'
    tracker.close()


def test_lines_of_one_step_are_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"train/loss": 1.0}, step=3)
    tracker.log({"eval/loss": 2.0}, step=3)
    tracker.close()
    assert read_metrics(path) == [{"step": 3, "train/loss": 1.0, "eval/loss": 2.0}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(7), 7),
        (np.array([2.0]), 2.0),
        (True, True),
        ("größe\n", "größe\n"),
    ],
)
def test_scalars_of_every_kind(tmp_path: Path, value: Metric, expected: float | str) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"x": value}, step=0)
    tracker.close()
    row: MetricRow = {"step": 0, "x": expected}
    assert read_metrics(tmp_path / "metrics.jsonl") == [row]


def test_an_array_of_the_device_is_a_scalar_too(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"half": jnp.bfloat16(1.5), "count": jnp.int32(7)}, step=0)
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "half": 1.5, "count": 7}\n'


def test_a_step_is_logged_once_and_steps_never_go_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1.0, 2.0, 3.0])
    before = path.read_bytes()
    tracker = JsonlTracker(path)
    with pytest.raises(ValueError, match=r"step=1 .*last step: 2.*truncate_to\(1\)"):
        tracker.log({"eval/loss": 2.0}, step=1)
    with pytest.raises(ValueError, match=r"step=2 \['train/loss'\]"):
        tracker.log({"train/loss": 9.0}, step=2)
    with pytest.raises(ValueError, match="may not be named 'step'"):
        tracker.log({"step": 4}, step=4)
    with pytest.raises(ValueError, match=r"'x' has shape \(2,\)"):
        tracker.log({"x": np.zeros(2)}, step=4)
    tracker.close()
    assert path.read_bytes() == before


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1.0, 2.0])
    path.write_text(path.read_text().replace('{"step": 0', '{"sXep": 0'))
    for read in (read_metrics, JsonlTracker):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is no metrics line"):
            read(path)


def test_build_trackers_cuts_the_file_back_to_the_checkpoint(tmp_path: Path) -> None:
    first = build_trackers((), tmp_path / "run", "name", start_step=0)
    for step in range(5):
        first.log({"train/loss": float(step)}, step=step)
    first.finish()
    second = build_trackers((), tmp_path / "run", "name", start_step=3)
    second.log({"train/loss": 30.0}, step=3)
    second.finish()
    assert [row["train/loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0.0, 1.0, 2.0, 30.0]


def test_a_run_without_other_trackers_imports_none(tmp_path: Path) -> None:
    code = """
import sys, pathlib
from grug_native.tracking.jsonl import build_trackers
build_trackers((), pathlib.Path(sys.argv[1]), "name", start_step=0).finish()
print({"levanter", "haliax", "wandb", "IPython"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_disk_that_takes_no_more_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"loss": 1.0}, step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
            tracker.log({"loss": 2.0}, step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log({"loss": 3.0}, step=2)
    tracker.close()
    assert [row["step"] for row in read_metrics(path)] == [0, 2]
