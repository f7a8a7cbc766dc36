import runpy
from pathlib import Path

import pytest


def test_the_tour_runs_to_its_end(
    tmp_path: Path, embedded_corpora: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "corpora").symlink_to(embedded_corpora)
    left = runpy.run_module("experiments.notebook_tour")
    assert int(left["state"].step) == 30
    assert (tmp_path / "runs" / "tour" / "loss.png").is_file()
    printed = capfd.readouterr().out
    for words in ("row 0, 0+", "not finite: None", "stablehlo", "def main(", "'.blocks.attn.wq': 'muon, rate 0.02"):
        assert words in printed
