import logging
import re
from pathlib import Path

import pytest

from grug_native.tracking.run_log import LOG_FILE, RunLog

logger = logging.getLogger("grug_native.test_run_log")


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "grug_native")


def said(folder: Path) -> list[str]:
    return [re.sub(r"^[-\d]+ [:\d]+ ", "", line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_all_that_is_said_is_kept_from_the_first_on(tmp_path: Path) -> None:
    with RunLog() as log:
        logger.info("before %s is known", "the place")
        assert not (tmp_path / LOG_FILE).exists()
        log.keep(tmp_path)
        logging.getLogger("someone").warning("else")
        logging.getLogger("someone").info("talkative")
        log.note("step 1/2")
    with RunLog() as log:
        log.keep(tmp_path)
        logger.warning("again")
    logger.warning("after it")
    assert said(tmp_path) == ["before the place is known", "else [warning of someone]", "step 1/2", "again"]


def test_why_a_run_ended_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the reason"), RunLog() as log:
        log.keep(tmp_path)
        raise ValueError("the reason")
    assert said(tmp_path)[-1] == "ValueError: the reason"


def test_a_log_that_cannot_be_written_costs_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    with RunLog() as log:
        log.keep(tmp_path)
        logger.info("one")
        logger.info("two")
    assert [m for m in caplog.messages if "log.txt" in m] == [
        f"{tmp_path / LOG_FILE} cannot be written to, the run goes on without it: [Errno 28] No space left on device"
    ]
