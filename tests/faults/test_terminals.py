"""F41 a pipe that nobody reads any more; F42, F43 Ctrl-C in each phase of a start, by a real signal of a real process.

Where there is nothing to save, Ctrl-C is heard within two seconds. What is waited for is longer, for busy machines, and
each phase is so long that it could not end by itself.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from grug_native.tracking.run_log import LOG_FILE
from tests.faults.runs import NUM_STEPS, ForkServer, Run, Running
from tests.fixtures_data import make_text

HEARD = 10.0
"""Seconds."""


def test_f41_a_pipe_that_nobody_reads_costs_nothing(run: Run, whole: Run, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = run.start("stop@step:3", output=pipe, command=("train", "--config_path", str(run.config)))
    reader = os.open(pipe, os.O_RDONLY)
    process.until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    os.close(reader)
    process.send(signal.SIGCONT)
    while process.alive():
        time.sleep(0.2)
    assert process.code() == 0
    run.expect_equal(whole)
    told = (run.folder / LOG_FILE).read_text()
    assert "is gone ([Errno 32] Broken pipe)" in told and f"step {NUM_STEPS}/{NUM_STEPS}" in told


def test_f41_why_a_run_ended_is_in_its_log(run: Run) -> None:
    run.fit("raise@step:4").expect(1)
    assert "InjectedFaultError: raise@step:4" in (run.folder / LOG_FILE).read_text()


def interrupt(process: Running, reached: Callable[[], object]) -> None:
    process.until(reached)
    process.send(signal.SIGINT)
    process.wait(HEARD).expect(130)


def test_f42_ctrl_c_while_the_step_is_compiled(run: Run, whole: Run, tmp_path: Path) -> None:
    run.edit({"model.num_layers": 120, "model.scan_layers": False})
    process = run.start(xla_cache=tmp_path / "no-programs")
    process.until_said("starting from scratch")
    time.sleep(2)
    interrupt(process, lambda: True)
    assert run.steps == []


def test_f42_ctrl_c_in_native_code_of_the_first_step(run: Run, whole: Run) -> None:
    process = run.start("sleep@compile:0")
    process.until_said("starting from scratch")
    time.sleep(1)
    interrupt(process, lambda: True)
    run.fit().expect(0)
    run.expect_equal(whole)


def test_f42_ctrl_c_while_it_evaluates(server: ForkServer, run: Run) -> None:
    """The first evaluation, with all to compile, and a later one."""
    run = server.run(run.folder, base="eval")
    process = run.start("sleep@eval:0")
    process.until(lambda: (run.folder / "config.yaml").exists())
    time.sleep(2)
    interrupt(process, lambda: True)
    process = run.start("int@eval:2")
    process.wait(60).expect(130)
    assert run.steps == [2]


def texts(folder: Path, documents: int, make: Callable[[int], str]) -> Path:
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number}.txt").write_text(make(number))
    return folder


@pytest.mark.parametrize("phase", ["tokenizer", "tokenizing"])
def test_f43_ctrl_c_while_a_corpus_is_made(phase: str, run: Run, tmp_path: Path) -> None:
    if phase == "tokenizer":  # One word of a megabyte: its pairs are counted again with each merge.
        folder = texts(tmp_path / "texts", 1, lambda _: make_text(0, 2_000) + "ab" * 500_000)
    else:  # Few words to learn the tokenizer from, much to tokenize.
        folder = texts(tmp_path / "texts", 8, lambda number: make_text(number, 4_000) * 200)
    command = ("train", "--text", str(folder), "--output_path", str(run.folder))
    process = run.start(command=command, directory=tmp_path)
    corpora = tmp_path / "runs" / "corpora"
    reached = "*/*/text" if phase == "tokenizer" else "*/*/tokenizer"
    process.until(lambda: any(path.parts[-3].startswith(".") for path in corpora.glob(f".{reached}")))
    time.sleep(1)
    interrupt(process, lambda: True)
