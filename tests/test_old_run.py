"""A run that an earlier version began goes on; `old_run/README.md` says how it was made."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grug_native.cli import main as cli
from tests.faults.runs import ForkServer, Run

OLD = Path(__file__).parent / "old_run"
MEASURED = ("train/loss", "optim/learning_rate", "grad/norm/total", "updates/norm/total", "params/norm/total")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_of_an_earlier_version_is_resumed(optimizer: str, server: ForkServer, tmp_path: Path) -> None:
    run = shutil.copytree(OLD, tmp_path / "old_run") / optimizer
    begun = (run / "metrics.jsonl").read_bytes()
    assert cli.main(["ckpt", "verify", str(run)]) == 0
    Run(server, run / "config.yaml", run).fit(command=("train", "--config_path", str(run))).expect(0)
    assert (run / "metrics.jsonl").read_bytes().startswith(begun) and begun.count(b"\n") == 4
    found, whole = rows_of(run / "metrics.jsonl"), rows_of(run / "whole.jsonl")
    assert [row["data/batch_digest"] for row in found] == [row["data/batch_digest"] for row in whole]
    for new, old in zip(found, whole, strict=True):
        assert new["step"] == old["step"]
        # The step has become another program since, and a processor may multiply in another order: rounding, no more.
        np.testing.assert_allclose([new[n] for n in MEASURED], [old[n] for n in MEASURED], rtol=2e-5)
    assert cli.main(["ckpt", "verify", str(run)]) == 0
