"""What a run says: messages, a bar in a terminal, lines of the log elsewhere, and where the start-up time went."""

import logging
import re
import sys
from collections.abc import Generator
from itertools import count
from types import SimpleNamespace

import pytest

from grug_native.tracking import progress
from grug_native.tracking.progress import MessageHandler, ProgressLine, StartUp, messages_shown


def run(steps: int, *, start: int = 0, bar: bool = False, mfu: float | None = None) -> None:
    line = ProgressLine(steps, start_step=start, bar=bar)
    for done in range(start + 1, steps + 1):
        # The first step is compiled on the way.
        seconds = 60.0 if done == start + 1 else 0.5
        throughput = {"throughput/duration": seconds, "throughput/tokens_per_second": 6000 / seconds}
        if mfu is not None:
            throughput["throughput/mfu"] = mfu
        line.update(done, loss=3.14159, learning_rate=6e-4, throughput=throughput, memory=3 * 2**29)
    line.close()


def test_without_a_terminal_it_is_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "grug_native")
    run(40, start=10, mfu=41.26)
    assert caplog.messages == [
        # The first step says what there is to expect, and nothing of the speed: it was compiled on the way.
        "step 11/40 (27.5%): loss 3.142, lr 6.00e-04, 1.5 GiB",
        "step 40/40 (100.0%): loss 3.142, lr 6.00e-04, 12,000 tokens/s, 41.3% MFU, 1.5 GiB, 00:00 left",
    ]


def test_lines_come_every_ten_seconds_and_tell_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "grug_native")
    clock = count(0, 4)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run(300)
    assert 20 < len(caplog.messages) < 300
    step, left = re.findall(r"step (\d+)/300.* (\d\d:\d\d) left", caplog.messages[5])[0]
    minutes, seconds = map(int, left.split(":"))
    assert 60 * minutes + seconds == (300 - int(step)) // 2


def test_in_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    run(40, start=10, bar=True)
    shown = capsys.readouterr().err
    assert shown.count("\r") > 1
    for part in ("100%", "40/40, loss 3.142, lr 6.00e-04, 12,000 tokens/s, 1.5 GiB, 00:00 left"):
        assert part in shown


@pytest.fixture
def levels_of_a_new_process() -> Generator[None]:
    """Some libraries set the root's level when they start; by `setLevel`, since loggers remember what is enabled."""
    levels = {logging.getLogger(): logging.WARNING, logging.getLogger("grug_native"): logging.NOTSET}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    yield
    for logger, level in before.items():
        logger.setLevel(level)


@pytest.mark.usefixtures("levels_of_a_new_process")
def test_messages_show_without_any_logging_set_up_and_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, root = logging.getLogger("grug_native"), logging.getLogger()
    for handlers in ([], [logging.StreamHandler()]):  # the second as some libraries leave it behind
        monkeypatch.setattr(root, "handlers", handlers)
        with messages_shown():
            run(3)
        assert capsys.readouterr().err.count("step 3/3 (100.0%)") == 1
        assert (package.handlers, package.level, package.propagate) == ([], logging.NOTSET, True)


def test_messages_go_where_the_user_sends_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    with messages_shown():
        run(3)
    assert capsys.readouterr().err == ""


def test_messages_of_others_say_whose_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("grug_native.loop", "levanter.data"):
        MessageHandler().emit(logging.LogRecord(name, logging.WARNING, "", 0, "the %s", ("words",), None))
    ours, theirs = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d the words", ours)
    assert theirs.endswith("the words [warning of levanter.data]")


def test_the_start_is_told_in_parts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "grug_native")
    monkeypatch.setattr(progress, "seconds_spent", lambda: 1.5)
    monkeypatch.setattr(StartUp, "_first", True)
    start_up = StartUp()
    with start_up.data():
        pass
    start_up.report(evaluation=0.0, compilation=0.0)
    # The age of the process says nothing of its second run, nor of a session's.
    StartUp().report(evaluation=0.0, compilation=0.0)
    monkeypatch.setattr(StartUp, "_first", True)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    StartUp().report(evaluation=0.0, compilation=0.0)
    told, *others = caplog.messages
    assert re.fullmatch(
        r"first step after [\d.]+ s: import [\d.]+, data 1\.5, evaluation 0\.0, compile 0\.0, other .*", told
    )
    assert len(others) == 2 and not any("import" in message for message in others)
