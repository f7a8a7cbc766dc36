"""Ctrl-C while a corpus is made, in each of the phases that are deep in foreign code; and a kill in one."""

import random
import signal
import string
import time
from pathlib import Path

import psutil
import pytest

from grug_native.data.corpus_making import sweep_scratch
from tests.faults.runs import ForkServer, Job, Running


def _text(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def _start(server: ForkServer, folder: Path) -> Running:
    runs = ("--output_path", str(folder / "run"), "--text", str(folder / "texts"))
    return server.start(
        Job(
            config=folder / "none",
            output=folder / "log",
            command=("train", *runs, "--trainer.num_train_steps", "1"),
            directory=folder,
        )
    )


def _children(running: Running) -> list[psutil.Process]:
    return [child for child in psutil.Process(running.pid).children() if _trains(child)]


def _trains(child: psutil.Process) -> bool:
    try:
        return "grug_native.data.corpus_store" in child.cmdline()
    except psutil.NoSuchProcess:  # another one, which has just ended
        return False


def _until_ended(children: list[psutil.Process]) -> None:
    """A zombie has ended: nobody may be there to collect it."""
    deadline = time.monotonic() + 15
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _hidden(folder: Path) -> list[Path]:
    return list((folder / "runs" / "corpora").glob(".*"))


def test_ctrl_c_ends_the_training_of_a_tokenizer(server: ForkServer, tmp_path: Path) -> None:
    letters = random.Random(0).choices(string.ascii_letters, k=4_000_000)
    _text(tmp_path / "texts", "one_line.txt", "".join(letters))
    running = _start(server, tmp_path)
    running.until(lambda: _children(running))
    children = _children(running)
    running.send(signal.SIGINT)
    running.wait(15).expect(130)
    assert not _hidden(tmp_path)
    _until_ended(children)


def test_ctrl_c_ends_the_tokenizing_of_one_long_document(server: ForkServer, tmp_path: Path) -> None:
    words = ("".join(random.Random(0).choices(string.ascii_letters, k=6)) for _ in range(3_000))
    _text(tmp_path / "texts", "one_document.txt", " ".join(words) * 1000)
    running = _start(server, tmp_path)
    running.until(lambda: list((tmp_path / "runs" / "corpora").glob(".*/*/cache/*")))
    running.send(signal.SIGINT)
    running.wait(15).expect(130)
    sweep_scratch(tmp_path / "runs" / "corpora")  # As the next start does: a thread of a library may write to the last.
    assert not _hidden(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_process_and_the_next_start_sweeps(
    server: ForkServer, tmp_path: Path, number: signal.Signals
) -> None:
    letters = random.Random(0).choices(string.ascii_letters, k=4_000_000)
    _text(tmp_path / "texts", "one_line.txt", "".join(letters))
    running = _start(server, tmp_path)
    running.until(lambda: _children(running))
    children = _children(running)
    running.send(number)
    running.wait(15).expect(-number)
    _until_ended(children)
    (left,) = _hidden(tmp_path)
    again = _start(server, tmp_path)
    again.until(lambda: not left.exists())
    again.send(signal.SIGKILL)
    again.wait(15).expect(-signal.SIGKILL)
