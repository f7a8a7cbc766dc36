"""The table of times to one target: its arithmetic, and what is refused."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import headline
from experiments.benchmarks.peers.gate import Turn
from experiments.benchmarks.peers.summary import Comparison


def turn(step: float) -> Turn:
    return Turn(seconds=3 * step, steps=[step] * 3, values=[], calls=[], finished_at=0, peak_rss=0, peak_device=None)


def test_a_step_is_the_median_of_the_turns_after_the_first_two() -> None:
    turns = [turn(step) for step in (9.0, 9.0, 0.1, 0.3, 0.2)]
    comparison = Comparison("toy", {}, sessions=[{"ours_fit": turns, "levanter_train": [*turns, turn(0.4), turn(0.5)]}])
    assert headline.seconds_of_steps(comparison) == pytest.approx({"ours_fit": 0.2, "levanter_train": 0.3})


def test_times_are_steps_by_what_each_takes() -> None:
    found = headline.times({"ours_fit": 0.1, "torch_compile": 0.2}, steps=300, ours=150, cost=1.2)
    assert found == pytest.approx({"ours_fit": 30, "torch_compile": 60, "recommended": 18})


def test_times_of_another_shape_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "compare.json"
    file.write_text(
        json.dumps({"shape": "toy", "environment": {}, "flops": {}, "records": {}, "sessions": [], "matmul": []})
    )
    with pytest.raises(SystemExit):
        headline.main([str(file)])
    assert "is of shape toy, and must be of CPU-R" in capsys.readouterr().err
