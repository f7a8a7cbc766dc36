import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import pytest
from rich.console import Console
from rich.table import Table

from grug_native.checkpoint import report as checkpoint_report
from grug_native.checkpoint import source as checkpoint_source
from grug_native.checkpoint.metadata import CheckpointError, read_metadata
from grug_native.checkpoint.report import (
    checkpoints_table,
    diff_checkpoints,
    diff_table,
    list_checkpoints,
    metadata_table,
    verify_checkpoint,
)
from grug_native.cli import ckpt as checkpoint_commands
from grug_native.host.run_folder import set_aside
from tests.small_state import make_state, save_step


def text_of(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 3 and 4 that differ in `params.embed` only, a damaged step 5, and one that was set aside."""
    folder = tmp_path_factory.mktemp("checkpoints")
    state = make_state(3)
    save_step(folder, 3, state=state)
    save_step(folder, 4, state=eqx.tree_at(lambda s: s.params.embed, state, state.params.embed.at[1, 2].add(0.5)))
    shutil.copytree(folder / "step-3", folder / "step-5")
    (folder / "step-5" / "grug_checkpoint.json").unlink()
    shutil.copytree(folder / "step-3", folder / "step-2")
    set_aside(folder / "step-2", "abandoned")
    return folder


def test_listing(folder: Path) -> None:
    entries = list_checkpoints(folder)
    assert [(e.path.name, e.problem is None) for e in entries] == [
        ("step-5", False),
        ("step-4", True),
        ("step-3", True),
        (".abandoned-step-2", False),
    ]
    assert all(e.disk_bytes > 1000 for e in entries)
    text = text_of(checkpoints_table(entries))
    assert "cannot" in text and "permanent" in text and "abandoned" in text


def test_what_a_run_deletes_meanwhile_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (checkpoint_report, checkpoint_source):
        monkeypatch.setattr(module, "committed_steps", lambda _: [9, 3])
    assert [entry.path.name for entry in list_checkpoints(folder)] == ["step-3", ".abandoned-step-2"]
    assert checkpoint_commands.verify(argparse.Namespace(run=str(folder), step=None)) == 0
    assert capsys.readouterr().out == "step-9: deleted by its run meanwhile\nstep-3: sound\n"


def test_showing(folder: Path) -> None:
    text = text_of(metadata_table(read_metadata(folder / "step-3")))
    assert "small step 3" in text and "float32[16, 8]" in text and "threefry2x32" in text


def test_verifying(folder: Path, tmp_path: Path) -> None:
    assert verify_checkpoint(folder / "step-4") == []
    assert "cannot be read" in verify_checkpoint(folder / "step-5")[0]
    copy = Path(shutil.copytree(folder / "step-4", tmp_path / "step-4"))
    shutil.rmtree(copy / "params")
    assert [problem.split(": ")[1].split(" ")[0] for problem in verify_checkpoint(copy)] == [
        "params.embed",
        "params.bias",
    ]


def test_differing(folder: Path) -> None:
    diff = diff_checkpoints(folder / "step-3", folder / "step-4")
    assert [str(d) for d in diff.fields] == ["step: stored 3, wanted 4", "data_offset: stored 24, wanted 32"]
    assert diff.structure == () and list(diff.values) == ["params.embed"] and diff.equal_leaves == 8
    assert math.isnan(diff.values["params.embed"])
    exact = diff_checkpoints(folder / "step-3", folder / "step-4", values=True)
    assert exact.values["params.embed"] == pytest.approx(0.5)
    assert "max |a - b| = 0.5" in text_of(diff_table(exact))
    with pytest.raises(CheckpointError):
        diff_checkpoints(folder / "step-3", folder / "step-5")


def test_listing_needs_no_array_library_and_verifying_no_orbax(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from grug_native.checkpoint.report import list_checkpoints, verify_checkpoint
folder = Path({str(folder)!r})
assert len(list_checkpoints(folder)) == 4
assert not {{"orbax", "tensorstore"}} & set(sys.modules), "listing"
assert verify_checkpoint(folder / "step-4") == []
assert "orbax" not in sys.modules, "verifying"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
