import json
from pathlib import Path

import pytest

from grug_native.evaluation.harness_reports import UnwrittenReportError, add_report


def report(accuracy: float, seconds: float = 1.0) -> str:
    return json.dumps({"run": {"step": 4, "seconds": seconds}, "results": {"acc": accuracy}})


def test_reports_are_added_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "harness"
    first = add_report(folder, 4, ["one", "my tasks/two"], report(0.5), {})
    assert first == folder / "step-4-one+my-tasks-two.json"
    assert add_report(folder, 4, ["other"], report(0.1), {}).name == "step-4-other.json"
    second = add_report(folder, 4, ["one", "my tasks/two"], report(0.75), {})
    assert second.name == "step-4-one+my-tasks-two-2.json"
    # A run that comes by the same step again finds the same.
    assert add_report(folder, 4, ["one", "my tasks/two"], report(0.75, seconds=9.0), {}) == second
    assert (first.read_text(), second.read_text()) == (report(0.5), report(0.75))
    assert len(list(folder.iterdir())) == 3


def test_a_report_that_cannot_be_written_is_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "harness").write_text("a file")
    with pytest.raises(UnwrittenReportError, match="the report cannot be written: File exists") as refused:
        add_report(tmp_path / "harness", 4, ["one"], report(0.5), {"lm_eval/one/acc": 0.5})
    assert refused.value.metrics == {"lm_eval/one/acc": 0.5} and refused.value.report == report(0.5)
    assert refused.value.filename == str(tmp_path / "harness")
