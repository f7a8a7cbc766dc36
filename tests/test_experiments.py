import ast
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.speedrun.grugformer_20260129 import grugformer_speedrun as speedrun
from grug_native.host.run_folder import RunLock
from grug_native.host.signals import ExitCode
from grug_native.metrics import parameter_counts
from grug_native.model import MODEL_PRESETS
from grug_native.recommended import recommended_optimizer
from grug_native.runner import GrugRunner
from tests.fixtures_run import MakeRun

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "levanter.models.grug_wrapper",
    "levanter.models.lm_model.LmConfig",
    "marin.speedrun.speedrun.default_speedrun",
}


def imported_names(source: Path) -> Iterator[str]:
    """Every module, and every name of a module, that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(module: str) -> Path | None:
    """Where a module of this repository is; None for what is no module, or not of this repository."""
    if module.split(".")[0] not in ("grug_native", "experiments"):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name in a module, and no module
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def test_the_speedrun_is_free_of_the_chain_that_it_replaces() -> None:
    waiting, seen = [ROOT / "experiments/speedrun/grugformer_20260129/grugformer_speedrun.py"], set[Path]()
    names = set[str]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        found = set(imported_names(source))
        names |= found
        waiting.extend(path for path in map(file_of, found) if path is not None)
    assert {path.stem for path in seen} >= {"grugformer_speedrun", "runner", "marin", "perplexity", "model"}
    assert not {name for name in names for forbidden in FORBIDDEN if f"{name}.".startswith(f"{forbidden}.")}


def test_the_first_run_says_something() -> None:
    from levanter.data.text.datasets import LmDataConfig

    assert speedrun.build_run("tiny", data=LmDataConfig()).eval.sample_prompts


@pytest.mark.parametrize("size", ["130m", "300m", "520m", "1_2b"])
def test_a_real_size_is_the_speedruns(size: str) -> None:
    config = speedrun.build_run(size)
    steps, tokens = (
        config.trainer.num_train_steps,
        config.trainer.data_offset(config.trainer.num_train_steps) * 2048,
    )
    assert (config.trainer.train_batch_size, config.seq_len) == (128, 2048)
    assert config.optimizer == recommended_optimizer(MODEL_PRESETS[size].hidden_dim)
    assert config.data.tokenizer == speedrun.LLAMA3_TOKENIZER and config.model.vocab_size == 128_256
    assert abs(tokens - 20 * parameter_counts(config.model)["total"]) < 128 * 2048
    assert speedrun.build_run(size, num_train_steps=7).trainer.num_train_steps == 7 != steps


def test_the_plan_of_every_size_needs_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    for size in speedrun.SIZES:
        speedrun.main(["--size", size, "--plan"])
        shown = capsys.readouterr().out
        assert f"{parameter_counts(MODEL_PRESETS[size])['total']:,}" in shown
        assert ("device FLOP/s" in shown) == (size != "tiny")


def test_a_real_size_trains_on_a_local_corpus(text_folder: Path, tmp_path: Path) -> None:
    from grug_native.data.corpus import local_text_data

    data = local_text_data({"caves": text_folder / "caves"}, cache_dir=tmp_path / "corpora", vocab_size=300)
    config = speedrun.build_run("130m", data=data, output_path=str(tmp_path / "run"))
    assert GrugRunner(config).batch(0).tokens.shape == (128, 2048)


def test_the_environment_chooses_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SR_USE_TPU", raising=False)
    assert speedrun.resources("1_2b").device.kind == "gpu" and speedrun.resources("tiny").device.kind == "cpu"
    monkeypatch.setenv("SR_USE_TPU", "1")
    assert speedrun.resources("1_2b").device.kind == "tpu" and speedrun.resources("tiny").device.kind == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "9b"], "size='9b' is unknown: choose one of tiny, 130m"),
        (["--size", "130m", "--data", "nowhere"], "--data='nowhere' is no folder"),
        (["--size", "130m", "--executor", "--data", "nowhere"], "--data='nowhere' is no folder"),
        (["--size", "130m"], "give the folder of a tokenizer.json"),
        (["--size", "130m", "--executor"], "--data local"),
        (["--cluster", "http://127.0.0.1:1"], "--cluster goes with --executor"),
        (["--steps", "0"], "--steps=0 must be at least 1"),
        (["--data", "nosuch_folder/"], "--data='nosuch_folder/' is no folder here"),
        (["--data", "./nosuch_folder"], "--data='./nosuch_folder' is no folder here"),
        (["--data", "/no/such"], "--data='/no/such' is no folder here"),
        (["--data", "data/shakespeare"], "if a folder was meant, there is none of this name"),
        (["--data", "data/shakespeare"], "give the folder of a tokenizer.json"),
        (["--data", "data/notes.txt"], "--data='data/notes.txt' is no folder, but a file"),
        (["--executor", "--output-path", "here"], "--output-path goes without --executor"),
        (["--executor", "--cluster", "http://127.0.0.1:1"], "MARIN_PREFIX is not set"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARIN_PREFIX", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("grug")
    with pytest.raises(SystemExit) as stopped:
        speedrun.main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_locked_folder_has_its_own_exit_code(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run()
    monkeypatch.setattr(speedrun, "build_run", lambda *_, **__: config)
    Path(config.output_path).mkdir()
    lock = RunLock(Path(config.output_path), "run")
    try:
        with pytest.raises(SystemExit) as stopped:
            speedrun.main([])
    finally:
        lock.release()
    assert stopped.value.code == ExitCode.LOCKED
    assert "grugformer_speedrun: " in capsys.readouterr().err


def test_no_steps_are_not_the_default() -> None:
    from levanter.data.text.datasets import LmDataConfig

    for size in ("tiny", "130m"):
        with pytest.raises(ValueError, match="num_train_steps=0 must be positive"):
            speedrun.build_run(size, data=LmDataConfig(), num_train_steps=0)


def test_runs_in_a_folder_of_text_are_no_text(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = shutil.copytree(text_folder / "caves", tmp_path / "texts")
    monkeypatch.chdir(texts)
    first = speedrun.choose_data(".", output_path="mine")
    (texts / "mine").mkdir()
    for name in ("runs/metrics.jsonl", "mine/samples.md"):
        (texts / name).write_text("{}")
    assert speedrun.choose_data(".", output_path="mine") == first


def test_a_folder_of_text_is_a_step_before_the_run(text_folder: Path) -> None:
    step = speedrun.build_step("130m", data=str(text_folder / "caves"))
    (corpus,) = step.deps
    assert corpus.name.endswith("caves") and step.name.endswith("caves")
    assert str(text_folder / "caves") in corpus.fingerprint_payload()
