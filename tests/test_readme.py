"""The README, taken at its word: every block of code is run, in a folder like that of someone who follows it.

Lines run in this process, which has imported what they need; a process each would take ten times as long. What cannot
run at full length here runs with the options of `SHORTENED`; what cannot run at all has its reason in `NOT_HERE`.
"""

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.speedrun.grugformer_20260129 import grugformer_speedrun as speedrun
from grug_native import MODEL_PRESETS
from grug_native.cli import main as cli
from grug_native.host.signals import ExitCode
from tests.fixtures_data import make_text, write_rolling_task
from tests.fixtures_run import without_runtime_types

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEEDRUN = "uv run python -m experiments.speedrun.grugformer_20260129.grugformer_speedrun"

SHORTENED = {
    SPEEDRUN: "--steps 2",
    f"{SPEEDRUN} --executor": "--steps 2",
    "uv run grug train --text my_folder/": (
        "--trainer.num_train_steps 3 --eval.max_eval_batches 1 --eval.sample_tokens 4 --model.hidden_dim 32 "
        "--model.intermediate_dim 64 --model.num_layers 1"
    ),
    "uv run grug train --config_path runs/my_folder --output_path runs/longer --trainer.num_train_steps 2000": (
        "--trainer.num_train_steps 4"
    ),
    "uv run grug train --text my_folder/ --name continued --init_from my_model": (
        "--trainer.num_train_steps 2 --eval.max_eval_batches 1 --eval.sample_tokens 4"
    ),
    "uv run python -m tests.faults.soak --kills 50": "--help",  # its parts are what tests/faults/test_kills.py runs
}
"""Options that are added to a command."""

NOT_HERE = {
    "pip install uv": "it needs the network; the machine that runs this has uv",
    "uv sync --extra gpu": "it needs the network",
    "uv sync --extra tpu": "it needs the network",
    "uv run pytest -n 2": "it is running",
    "uv run pytest tests/faults -m slow_faults": "it needs root, mounts and minutes",
    "uv run ruff format --check": "CI runs it beside the tests",
    "uv run ruff check": "CI runs it beside the tests",
    "uv run pyright": "CI runs it beside the tests",
    "uv run lint-imports": "CI runs it beside the tests, and so does test_architecture.py",
}
"""Commands that are only looked at, and why."""


def blocks(language: str) -> list[str]:
    """The contents of the README's blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The commands of the README's shell blocks, in order, without their comments."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    parts = [shlex.join(shlex.split(part, comments=True)) for line in lines for part in line.split(" && ")]
    return list(dict.fromkeys(parts))


@pytest.fixture(scope="module")
def folder(embedded_corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """What a reader has at hand: texts, a task, minimal pairs; and a `tiny` that is tinier than the real one."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs").mkdir()
    (folder / "runs" / "corpora").symlink_to(embedded_corpora)
    for number, suffix in enumerate(("txt", "txt", "md", "py")):
        (folder / "my_folder").mkdir(exist_ok=True)
        (folder / "my_folder" / f"{number}.{suffix}").write_text(make_text(number, 6000))
    (folder / "blimp").mkdir()
    pair = {"sentence_good": "grug brain say", "sentence_bad": "say grug brain"}
    (folder / "blimp" / "order.jsonl").write_text(f"{json.dumps(pair)}\n" * 2)
    write_rolling_task(folder).rename(folder / "my_task.yaml")
    small = replace(MODEL_PRESETS["tiny"], vocab_size=1024, hidden_dim=32, intermediate_dim=64, num_layers=1)
    with pytest.MonkeyPatch.context() as patch, without_runtime_types():
        patch.setitem(MODEL_PRESETS, "tiny", replace(small, num_heads=2, num_kv_heads=2, max_seq_len=64))
        patch.setenv("LOGNAME", "reader")
        patch.delenv("MARIN_PREFIX", raising=False)
        patch.chdir(folder)
        yield folder


def run(command: str, patch: pytest.MonkeyPatch) -> None:
    """Runs one command of the README, shortened if need be, in this process."""
    program, *arguments = shlex.split(f"{command} {SHORTENED.get(command, '')}".removeprefix("uv run "))
    if program == "grug":
        assert cli.main(arguments) == 0
        return
    assert (program, arguments[0]) == ("python", "-m")
    patch.setattr(sys, "argv", arguments[1:])
    try:
        importlib.import_module(arguments[1]).main()
    except SystemExit as ended:
        assert ended.code == 0


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The folder after the README's own command has trained on the reader's text."""
    with pytest.MonkeyPatch.context() as patch:
        run("uv run grug train --text my_folder/", patch)
    return folder


def test_nothing_is_forgotten() -> None:
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"", "python", "sh", "text"}
    assert {*SHORTENED, *NOT_HERE} <= set(commands())


@pytest.mark.parametrize("command", [command for command in commands() if command not in NOT_HERE])
def test_a_command_runs(command: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(command, monkeypatch)


def test_what_the_commands_leave_is_where_the_readme_says(trained: Path) -> None:
    for name in ("loss.png", "samples.md", "config.yaml", "metrics.jsonl"):
        assert (trained / "runs" / "my_folder" / name).is_file()
    (layout,) = (block for block in blocks("text") if block.startswith("runs/NAME/"))
    for name in re.findall(r"^  ([\w.]+)[/ ]", layout, re.MULTILINE):
        assert (trained / "runs" / "my_folder" / name).exists() or name in ("harness", "profile")


def test_python_blocks_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_run = speedrun.build_run
    monkeypatch.setattr(speedrun, "build_run", lambda size: build_run(size, num_train_steps=2))
    shutil.rmtree(folder / "runs" / "grugformer-tiny", ignore_errors=True)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_what_ci_runs_is_what_contributors_are_told() -> None:
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    block = blocks("sh")[-1]
    told = [part for line in block.splitlines() for part in line.split(" && ")]
    assert told == [step.removesuffix(" --no-logo") for step in steps if step.startswith("uv run ")]


def test_every_module_has_its_place_in_the_layout() -> None:
    table = README[README.index("## How it is laid out") : README.index("## How fast")]
    patterns = [
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    ]
    package = ROOT / "lib" / "grug_native"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(patterns) == sorted({path.stem for path in package.glob("*.py")} - {"__init__"} | rooms)


def test_exit_codes_are_those_of_the_program() -> None:
    told = set(map(int, re.findall(r"^\| (\d) \|", README, re.MULTILINE)))
    assert told == {int(code) for code in ExitCode}


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(r"\]\((docs/[^)]*)\)", README) + re.findall(r"`(experiments/[\w/.]+)`", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_class_that_is_named_as_a_type_is_there() -> None:
    for module, name in re.findall(r"`?--\w+\.type (experiments[\w.]+):(\w+)", README):
        assert hasattr(importlib.import_module(module), name)


def test_every_field_in_the_table_of_edits_is_in_the_reference() -> None:
    table = README[README.index("## What do I edit") : README.index("## Your own text")]
    known = (ROOT / "docs" / "config.md").read_text()
    fields = [name for name in re.findall(r"--\w+\.([\w.]+)", table) if name.split(".")[-1] != "type"]
    assert [name for name in fields if f"| `{name.split('.')[-1]}` |" not in known] == ["expert_dim", "shared_dim"]


def test_the_diagram_is_short() -> None:
    (diagram,) = (block for block in blocks("text") if block.startswith("text files"))
    assert len(diagram.splitlines()) <= 12
