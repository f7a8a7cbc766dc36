"""A run is its folder: moved, renamed, copied, or looked at from elsewhere, with its corpus or without."""

import shutil
from pathlib import Path

import pytest
import yaml

from grug_native.checkpoint.run_place import settings_hash
from grug_native.config import config_from_dict, config_to_dict, load_config, save_own_config, with_own_name
from grug_native.data.corpus_store import RECORD_FILE
from grug_native.host.run_folder import CHECKPOINTS_FOLDER
from grug_native.runner import GrugRunner
from tests.fixtures_run import MakeRun

KEY = "0123456789abcdef"


@pytest.fixture
def project(tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with `runs/a` and `runs/corpora/KEY`, as seen from its own folder; nothing is trained."""
    project = tmp_path / "project"
    for name in ("cache", "tokenizer"):
        (project / "runs" / "corpora" / KEY / name).mkdir(parents=True)
    (project / "runs" / "corpora" / KEY / RECORD_FILE).write_text("{}")
    (project / "runs" / "a" / CHECKPOINTS_FOLDER).mkdir(parents=True)
    monkeypatch.chdir(project)
    raw = config_to_dict(make_run())
    corpus = Path("runs/corpora").absolute() / KEY
    raw["data"] |= {"tokenizer": str(corpus / "tokenizer"), "cache_dir": str(corpus / "cache")}
    raw["data"]["components"]["caves"]["source"]["train_urls"] = [str(corpus / "text" / "caves.train.jsonl")]
    save_own_config(config_from_dict(raw | {"output_path": "runs/a"}))
    return project


def corpus_of(run: Path) -> Path:
    data = load_config(run).data
    assert Path(data.tokenizer).parent == Path(str(data.cache_dir)).parent
    return Path(data.tokenizer).parent


def test_the_place_of_a_folder_wins_and_is_said(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = project / "runs"
    assert load_config(runs / "a").output_path == str(runs / "a")
    assert caplog.messages == []
    shutil.copytree(runs / "a", runs / "copy")
    (runs / "a").rename(runs / "b")
    for given in (runs / "b", runs / "b" / "config.yaml", Path("runs/b"), Path("runs/b/")):
        caplog.clear()
        config = load_config(given)
        assert (Path(config.output_path).resolve(), config.run_id) == (runs / "b", "a")
        assert caplog.messages == [
            f"the run is {config.output_path}: its folder counts, and not the output_path='{runs / 'a'}' in it"
        ]
    (runs / "b").rename(runs / "a")
    assert load_config(runs / "copy").output_path == str(runs / "copy")
    assert caplog.messages[-1].endswith("; that one is a run too, and is left alone")


def test_a_config_that_is_no_runs_keeps_its_output_path(project: Path) -> None:
    shutil.copy(project / "runs" / "a" / "config.yaml", project / "config.yaml")
    assert load_config(project / "config.yaml").output_path == str(project / "runs" / "a")


def test_from_any_working_directory_it_is_the_same_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose config.yaml has relative paths, as older ones have."""
    file = project / "runs" / "a" / "config.yaml"
    raw = yaml.safe_load(file.read_text())
    raw["data"]["cache_dir"] = f"runs/corpora/{KEY}/cache"
    raw["output_path"] = "runs/a"
    for written in (raw["output_path"], str(project / "runs" / "a")):
        file.write_text(yaml.safe_dump(raw | {"output_path": written}))
        for place in (project, project / "runs", project.parent):
            monkeypatch.chdir(place)
            config = load_config(project / "runs" / "a")
            assert (config.run_id, Path(config.output_path)) == ("a", project / "runs" / "a")
            assert Path(str(config.data.cache_dir)).absolute() == project / "runs" / "corpora" / KEY / "cache"


def test_what_moved_with_a_run_is_found_there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = project / "runs" / "corpora" / KEY
    # A copy of the project has its own; a copy of the run alone goes on with what it had.
    other = Path(shutil.copytree(project, project.parent / "other"))
    assert corpus_of(other / "runs" / "a") == other / "runs" / "corpora" / KEY
    # Of the kinds of sources, one that has URLs.
    [url] = load_config(other / "runs" / "a").data.components["caves"].source.train_urls  # pyright: ignore
    assert url == str(other / "runs" / "corpora" / KEY / "text" / "caves.train.jsonl")
    alone = Path(shutil.copytree(project / "runs" / "a", project.parent / "alone" / "deep" / "a"))
    assert corpus_of(alone) == old
    # By its key, wherever above the run it is.
    monkeypatch.chdir(project.parent)
    deeper = project / "runs" / "old" / "of mine" / "a"
    shutil.copytree(project / "runs" / "a", deeper)
    moved = project.rename(project.parent / "moved")
    assert corpus_of(moved / "runs" / "a") == moved / "runs" / "corpora" / KEY
    assert corpus_of(moved / "runs" / "old" / "of mine" / "a") == moved / "runs" / "corpora" / KEY
    (moved / "runs" / "corpora" / KEY / RECORD_FILE).unlink()
    assert corpus_of(moved / "runs" / "old" / "of mine" / "a") == old


def test_paths_and_hub_names_are_told_apart(project: Path) -> None:
    config = load_config(project / "runs" / "a")
    raw = config_to_dict(config)
    raw["data"] |= {"tokenizer": "org/name", "cache_dir": "gs://bucket/caches", "cache_catalog": None}
    raw["eval"]["harness"] = {"tasks": ["piqa", "runs", {"task": "mine"}], "include_path": "tasks"}
    save_own_config(config_from_dict(raw))
    written = yaml.safe_load((project / "runs" / "a" / "config.yaml").read_text())
    assert (written["data"]["tokenizer"], written["data"]["cache_dir"]) == ("org/name", "gs://bucket/caches")
    harness = written["eval"]["harness"]
    assert harness["tasks"] == ["piqa", str(project / "runs"), {"task": "mine"}]
    assert harness["include_path"] == str(project / "tasks")


def test_a_run_keeps_its_name_and_another_folder_gets_its_own(make_run: MakeRun) -> None:
    config = make_run()
    assert with_own_name(config) is config
    folder = Path(config.output_path)
    (folder / CHECKPOINTS_FOLDER).mkdir(parents=True)
    save_own_config(config)
    moved = config_from_dict(config_to_dict(config) | {"output_path": str(folder.rename(folder.with_name("moved")))})
    assert GrugRunner(moved).config.run_id == "run"
    # Once more, after the first start there has written its own config.
    save_own_config(GrugRunner(moved).config)
    assert GrugRunner(moved).config.run_id == load_config(Path(moved.output_path)).run_id == "run"


def test_the_hash_of_the_settings_knows_no_place(project: Path) -> None:
    raw = config_to_dict(load_config(project / "runs" / "a"))
    shutil.copytree(project / "runs", project / "more" / "runs")
    (project / "more" / "runs" / "a").rename(project / "more" / "runs" / "b")
    moved = config_to_dict(load_config(project / "more" / "runs" / "b"))
    assert moved != raw and settings_hash(moved) == settings_hash(raw)
    assert settings_hash(raw | {"eval": raw["eval"] | {"max_eval_batches": 7}}) != settings_hash(raw)


def test_what_one_start_allows_is_not_kept(make_run: MakeRun) -> None:
    config = make_run(trainer={"allow_changes": ("optimizer",)})
    Path(config.output_path).mkdir()
    save_own_config(config)
    assert load_config(Path(config.output_path)).trainer.allow_changes == ()
