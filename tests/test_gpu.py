import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import Group, waves
from experiments.benchmarks.peers.summary import Comparison
from experiments.benchmarks.peers.worker import ROOT

GROUPS = [Group(shape=shape, kind=kind) for shape in ("G-124M", "G-1.3B") for kind in ("plain", "packed")]


@pytest.mark.parametrize(
    ("memory", "sizes", "fitting"),
    [(139.0, [2, 1, 1], [True, True, True]), (78.0, [2, 1, 1], [True, False, False]), (None, [4], [True])],
)
def test_what_fits_together_starts_together(memory: float | None, sizes: list[int], fitting: list[bool]) -> None:
    found = waves(GROUPS, memory)
    assert [group for wave in found for group in wave] == GROUPS
    assert [len(wave) for wave in found] == sizes
    assert [gpu.fits(wave, memory) for wave in found] == fitting


def test_it_needs_nothing_of_levanter() -> None:
    code = "import sys, experiments.benchmarks.gpu; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"levanter", "haliax", "fray", "draccus", "datasets", "pyarrow", "rich"}.intersection(
        done.stdout.split()
    )


def test_an_interpreter_without_torch_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--torch-python", sys.executable])
    assert "has no torch: name an interpreter that has it with --torch-python" in capsys.readouterr().err


def test_both_kinds_of_rows_are_measured_and_profiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch is in no environment of these tests, so ours runs alone.
    monkeypatch.setattr(gpu, "NAMES", ("ours_step",))

    def has_torch(python: str) -> bool:
        return True

    monkeypatch.setattr(gpu, "has_torch", has_torch)
    # Two waves, so that the second one's contender is started early.
    monkeypatch.setattr(gpu, "fits", lambda groups, memory, beside=0.0: len(groups) == 1)
    file = tmp_path / "numbers.json"
    asked = ["--shape", "toy", "--cpu", "--profile", "--rounds", "2", "--steps", "2"]
    gpu.main([*asked, "--work-dir", str(tmp_path), "--json", str(file)])
    printed = capsys.readouterr().out
    found = {name: Comparison.from_json(raw) for name, raw in json.loads(file.read_text()).items()}
    assert list(found) == ["toy-plain", "toy-packed"]
    for name, comparison in found.items():
        (session,) = comparison.sessions
        assert [len(turn.values) for turn in session["ours_step"]] == [1, 1, 2, 2]
        assert comparison.records["ours_step"].cold[0].first_step_after > 0
        assert f"{name}, in turns" in printed and f"{name}, ours_step: kernels, all devices" in printed
    plain, packed = (comparison.sessions[0]["ours_step"][0].values for comparison in found.values())
    assert plain != packed and plain == pytest.approx(packed, rel=0.05)  # nothing is learnt yet
    gpu.main([*asked, "--work-dir", str(tmp_path), "--json", str(file), "--minutes", "-1"])
    assert "no time for toy-packed: not measured" in capsys.readouterr().out
