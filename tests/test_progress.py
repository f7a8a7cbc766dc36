"""The progress line: a bar in a terminal, lines of the log elsewhere."""

import logging

import pytest
import tqdm
from tqdm_loggable import auto, tqdm_logging

from grug_native.progress import ProgressLine


def run(steps: int, *, start: int = 0) -> None:
    line = ProgressLine(steps, start_step=start)
    for done in range(start + 1, steps + 1):
        line.update(done, loss=3.14159, learning_rate=6e-4, tokens_per_second=12_345.0)
    line.close()


def test_without_a_terminal_it_is_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "tqdm", tqdm_logging.tqdm_logging)
    run(40, start=10)
    last = caplog.messages[-1]
    for part in ("train", "40.0step/40.0step", "100.0%", "loss=3.142", "lr=6.00e-04", "12,345 tokens/s", "remaining:"):
        assert part in last
    assert not any("\r" in message for message in caplog.messages)


def test_lines_show_without_any_logging_set_up_and_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto, "tqdm", tqdm_logging.tqdm_logging)
    logger = logging.getLogger(tqdm_logging.__name__)
    monkeypatch.setattr(logger, "propagate", False)  # as if nobody listened
    run(3)
    assert "3.00step/3.00step" in capsys.readouterr().err
    assert not logger.handlers
    assert logger.level == logging.NOTSET


def test_in_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(auto, "tqdm", tqdm.tqdm)
    run(40, start=10)
    bar = capsys.readouterr().err
    assert bar.count("\r") > 1
    for part in ("100%", "40/40", "loss=3.142", "lr=6.00e-04", "12,345 tokens/s"):
        assert part in bar
