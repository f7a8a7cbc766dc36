"""F38 to F40: a run's folder that was renamed, copied or moved, alone or with its corpora; seen from elsewhere."""

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
import yaml

from grug_native.tracking.jsonl import METRICS_FILE
from tests.faults.runs import Ended, ForkServer, Run


def train(server: ForkServer, folder: Path, *more: str, place: Path | None = None) -> Ended:
    """What `grug train --config_path FOLDER` does, as a process of its own in a working directory of its own."""
    run = Run(server, folder / "config.yaml", folder)
    command = ("train", "--config_path", str(folder), *more)
    return run.fit(command=command, directory=place)


@pytest.fixture(scope="module")
def begun(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Where a project is, and a copy of it: its corpora, and a run `a`, begun with a relative path, at step 5 of 8."""
    project = tmp_path_factory.mktemp("projects") / "project"
    shutil.copytree(server.corpus(), project / "runs" / "corpora")
    run = server.run(project / "a")
    [root] = (path for path in (project / "runs" / "corpora").iterdir() if (path / "cache").is_dir())
    run.edit(
        {
            "output_path": "runs/a",
            "data.tokenizer": str(root / "tokenizer"),
            "data.cache_dir": str(root / "cache"),
            "trainer.run_id": None,
        }
    )
    run.fit(stop_after=5, directory=project).expect(0)
    run.config.unlink()
    assert Run(server, run.config, project / "runs" / "a").steps == [5, 4, 2]
    return project, project.rename(project.with_name("copy"))


@pytest.fixture
def project(begun: tuple[Path, Path]) -> Generator[Path]:
    """The project where it was made, as its run left it."""
    project, copy = begun
    yield Path(shutil.copytree(copy, project))
    shutil.rmtree(project, ignore_errors=True)  # Or it was moved away.


def expect_whole(server: ForkServer, folder: Path, whole: Run) -> None:
    run = Run(server, folder / "config.yaml", folder)
    run.expect_equal(whole)
    assert run.names() == whole.names()
    assert (folder / METRICS_FILE).read_bytes().count(b"\n") == (whole.folder / METRICS_FILE).read_bytes().count(b"\n")


def test_f38_a_renamed_run_goes_on_where_it_is(server: ForkServer, project: Path, whole: Run, tmp_path: Path) -> None:
    runs = project / "runs"
    shutil.copytree(runs / "a" / "checkpoints" / "step-5", runs / "a" / "checkpoints" / ".saving-a-step-6")
    new = (runs / "a").rename(runs / "renamed")
    said = train(server, new, "--stop_after", "6", place=tmp_path).expect(0, f"the run is {new}", "resuming from")
    assert f"removed {new / 'checkpoints' / '.saving-a-step-6'}" in said
    again = new.rename(runs / "renamed-again")
    train(server, again, place=tmp_path).expect(0)
    expect_whole(server, again, whole)
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["corpora", "renamed-again"]
    assert not (tmp_path / "runs").exists()


def test_f39_a_copy_of_a_run_that_is_being_trained_is_a_run_of_its_own(
    server: ForkServer, project: Path, whole: Run, tmp_path: Path
) -> None:
    original = Run(server, project / "runs" / "a" / "config.yaml", project / "runs" / "a")
    training = original.start("sleep@step:6", command=("train", "--config_path", str(original.folder)))
    training.until(lambda: 6 in original.steps)
    copy = Path(shutil.copytree(original.folder, tmp_path / "copy"))
    before = original.names()
    train(server, copy).expect(0, f"the run is {copy}", "that one is a run too, and is left alone")
    expect_whole(server, copy, whole)
    assert original.names() == before
    training.kill()
    train(server, original.folder).expect(0)
    expect_whole(server, original.folder, whole)


def test_f40_a_moved_project_works_from_anywhere(server: ForkServer, project: Path, whole: Run, tmp_path: Path) -> None:
    moved = project.rename(tmp_path / "moved")
    folder = moved / "runs" / "a"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = Run(server, folder / "config.yaml", folder)
    for command, words in (
        (("plan", str(folder)), "goes on from step 5"),
        (("sample", str(folder), "grug", "--max_new_tokens", "2"), "grug"),
        (("sample", "../moved/runs/a", "grug", "--max_new_tokens", "2"), "grug"),
    ):
        run.fit(command=command, directory=elsewhere).expect(0, words)
    train(server, folder, place=elsewhere).expect(0)
    expect_whole(server, folder, whole)
    assert list(elsewhere.iterdir()) == []
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["output_path"] == str(folder)
    assert Path(written["data"]["cache_dir"]).is_relative_to(moved)


def test_f40_a_run_without_its_corpus_is_told_what_it_lacks(server: ForkServer, project: Path, tmp_path: Path) -> None:
    (project / "runs" / "corpora").rename(tmp_path / "corpora-elsewhere")
    said = train(server, project / "runs" / "a").expect(2, "data.tokenizer=", "is no folder here")
    assert "damaged" not in said
