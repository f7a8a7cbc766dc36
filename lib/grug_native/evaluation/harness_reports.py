"""Where the full reports of lm-eval's tasks go: added to those that are there, never in place of one."""

import itertools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

logger = logging.getLogger(__name__)

_LONGEST_NAME = 100


class UnwrittenReportError(OSError):
    """What was computed could not be written; it is in here."""

    metrics: Mapping[str, float]
    """The numbers, by name."""
    report: str
    """The whole report, as JSON."""


def add_report(folder: Path, step: int, tasks: Sequence[str], report: str, metrics: Mapping[str, float]) -> Path:
    """Writes a report as `step-STEP-TASKS.json`, or if there is one of that name, `...-2.json` and so on.

    One that says the same as the newest of its name, as when a run comes by a step for the second time, is not added.

    Args:
        folder: of the reports; made if need be.
        step: updates behind the parameters.
        tasks: names of what was asked for.
        report: JSON text, with a `run` whose `seconds` differ each time.
        metrics: the numbers of it, for the error.

    Returns:
        Its file.

    Raises:
        UnwrittenReportError: it cannot be written.
    """
    names = re.sub(r"[^\w.+-]+", "-", "+".join(tasks))[:_LONGEST_NAME]
    stem = f"step-{step}-{names}"
    partial = folder / f".{stem}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(report)
        path = _publish(partial, folder, stem, report)
        partial.unlink()
    except OSError as error:
        with suppress(OSError):  # Where nothing can be written, there is nothing to remove either.
            partial.unlink()
        unwritten = UnwrittenReportError(
            error.errno,
            f"the report cannot be written: {error.strerror}; the folder must be one that can be written to",
            str(folder),
        )
        unwritten.metrics, unwritten.report = metrics, report
        raise unwritten from error
    logger.info("report: %s", path)
    return path


def _publish(partial: Path, folder: Path, stem: str, report: str) -> Path:
    before: Path | None = None
    for number in itertools.count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            os.link(partial, path)  # Unlike a rename, it replaces nothing.
        except FileExistsError:
            before = path
            continue
        if before is not None and _said(before.read_text()) == _said(report):
            path.unlink()
            return before
        return path
    raise AssertionError("there is always another number")


def _said(report: str) -> dict[str, Any]:
    content = cast(dict[str, Any], json.loads(report))
    return content | {"run": {name: value for name, value in content["run"].items() if name != "seconds"}}
