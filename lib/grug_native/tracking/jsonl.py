"""Where the metrics of a run go: `metrics.jsonl` always, and levanter's trackers beside it."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast, final

import jax
import numpy as np

from grug_native.tracking.external import ExternalTracker, Tracker, TrackerConfig

METRICS_FILE = "metrics.jsonl"
"""Name of the metrics file in the directory of a run."""

Scalar = bool | int | float | str
"""What a metric is on disk."""

Metric = Scalar | np.generic | np.ndarray | jax.Array
"""What can be logged: a plain scalar, or an array that holds one number."""

MetricRow = dict[str, Scalar]
"""The metrics of one step, its number under "step"."""

# The spelling of protobuf's JSON, which `float()`, pandas and JavaScript's `Number()` all read back.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@final
class JsonlTracker:
    r"""Appends metrics to a local file: one JSON object a line, `{"step": 12, "train/loss": 3.1}`.

    A line is handed to the system whole and at once, so that whoever follows the file never waits for it, and a kill
    leaves at most a torn last line behind, which the next run cuts off. Nothing is synced to the disk per step. Steps
    never go back; a step may have several lines (training metrics, then an evaluation's) if no metric is in two of
    them: `read_metrics` joins them. A number that is not finite is written as the string "NaN", "Infinity" or
    "-Infinity", which JSON knows and `read_metrics` and pandas read back as a number.
    """

    def __init__(self, path: Path):
        """Opens or creates `path`, and goes on after its last whole line.

        Args:
            path: The file; its directory is made if need be.

        Raises:
            ValueError: A line other than a torn last one is no metrics line.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.truncate_to(None)
        self._file = path.open("ab", buffering=0)

    def truncate_to(self, step: int | None) -> None:
        """Cuts the file back to what a checkpoint knows, for a run that resumes from it.

        Args:
            step: The first step that will be logged again, that is the number of steps the checkpoint has taken. All
                lines of this step and later ones go, as does a torn last line. None: only the torn line goes.

        Raises:
            ValueError: A line other than a torn last one is no metrics line.
        """
        self._last_step, self._last_keys = -1, frozenset[str]()
        kept = 0
        for row, end in _rows(self._path):
            row_step = int(row["step"])
            if step is not None and row_step >= step:
                break
            keys = frozenset(row) - {"step"}
            self._last_keys = keys if row_step > self._last_step else self._last_keys | keys
            self._last_step, kept = row_step, end
        os.truncate(self._path, kept)

    def log(self, metrics: Mapping[str, Metric], *, step: int) -> None:
        """Appends one line.

        Args:
            metrics: Name to value.
            step: Zero-based number of the step the metrics belong to.

        Raises:
            ValueError: The step, or a metric of it, has been logged; a value is no scalar; a metric is named "step".
            OSError: The line could not be written (a full disk).
        """
        row = {name: _scalar(name, value) for name, value in metrics.items()}
        if "step" in row:
            raise ValueError("a metric may not be named 'step': that key holds the number of the step; rename it")
        repeated = sorted(self._last_keys & row.keys()) if step == self._last_step else []
        if step < self._last_step or repeated:
            raise ValueError(
                f"step={step} {repeated or ''} is in {self._path} already (last step: {self._last_step}); "
                f"call truncate_to({step}) first to log it anew"
            )
        encoded = {name: _spelled(value) for name, value in row.items()}
        line = json.dumps({"step": step, **encoded}, allow_nan=False, ensure_ascii=False) + "\n"
        rest, end = memoryview(line.encode()), os.fstat(self._file.fileno()).st_size
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            os.truncate(self._path, end)  # The next line must not go on where this one broke off.
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._last_keys = frozenset(row) if step > self._last_step else self._last_keys | row.keys()
        self._last_step = step

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[MetricRow]:
    """Reads a metrics file, of a running or a killed run too.

    Args:
        path: A `metrics.jsonl`.

    Returns:
        One row a step, in order of the steps. Non-finite numbers are floats again; a torn last line is left out.

    Raises:
        ValueError: A line other than a torn last one is no metrics line.
    """
    rows: list[MetricRow] = []
    for row, _ in _rows(path):
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1].update(row)
        else:
            rows.append(row)
    return rows


@final
class RunTracker:
    """What a run logs to. Make it with `build_trackers`."""

    def __init__(self, jsonl: JsonlTracker | None, others: Sequence[Tracker]):
        """Joins trackers.

        Args:
            jsonl: The local file; None on a process that does not own it.
            others: Trackers whose methods neither block nor raise.
        """
        self._jsonl = jsonl
        self._others = tuple(others)

    def log(self, metrics: Mapping[str, Metric], *, step: int) -> None:
        """Records the metrics of a step everywhere; see `JsonlTracker.log` for what it asks and raises."""
        row = {name: _scalar(name, value) for name, value in metrics.items()}
        if self._jsonl is not None:
            self._jsonl.log(row, step=step)
        for tracker in self._others:
            tracker.log(row, step=step)

    def log_hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Records the settings of the run with levanter's trackers (on disk they are `config.yaml`).

        Args:
            config: Plain data; nested mappings become dotted names, `{"model": {"num_layers": 2}}` is
                `model.num_layers`.
        """
        flat = dict(_flat(config, ""))
        for tracker in self._others:
            tracker.log_hyperparameters(flat)

    def log_summary(self, metrics: Mapping[str, Metric]) -> None:
        """Records numbers of the whole run with levanter's trackers (final loss, number of parameters)."""
        row = {name: _scalar(name, value) for name, value in metrics.items()}
        for tracker in self._others:
            tracker.log_summary(row)

    def finish(self) -> None:
        """Closes everything; a tracker that does not come to an end is given up after its time."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._others:
            with ThreadPoolExecutor(len(self._others)) as pool:
                list(pool.map(lambda tracker: tracker.finish(), self._others))


def build_trackers(
    configs: Sequence[TrackerConfig], run_dir: Path, run_id: str, *, start_step: int, finish_timeout: float = 60.0
) -> RunTracker:
    """Opens `run_dir/metrics.jsonl` and starts levanter's trackers beside it.

    A tracker of levanter's lives on a thread of its own. One that cannot start, raises, blocks or cannot be reached
    costs the run a warning that names it, and nothing else. wandb uploads no code unless its config names a directory
    (`save_code=True` is levanter's default, so it counts as not asked for).

    Args:
        configs: levanter's tracker configs; none is fine.
        run_dir: Directory of the run.
        run_id: Name of the run with every tracker. A resumed run passes the same, and wandb goes on with the same run.
        start_step: The first step that will be logged: 0, or the step of the checkpoint that the run resumes from.
            What was logged from there on is cut off (JSONL), purged (tensorboard) or kept and not logged twice (wandb).
        finish_timeout: Seconds that `finish` waits for levanter's trackers, all of them together.

    Raises:
        ValueError: The existing `metrics.jsonl` holds a line that is no metrics line.
    """
    jsonl = None
    if jax.process_index() == 0:
        jsonl = JsonlTracker(run_dir / METRICS_FILE)
        jsonl.truncate_to(start_step)
    if not configs:
        return RunTracker(jsonl, ())
    others = [ExternalTracker(c, run_id, start_step=start_step, finish_timeout=finish_timeout) for c in configs]
    return RunTracker(jsonl, others)


def _rows(path: Path) -> Iterator[tuple[MetricRow, int]]:
    """The whole lines of a metrics file, each with the offset in bytes at which it ends."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = cast(dict[str, Scalar], json.loads(line))
                int(row["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no metrics line: {line[:60]!r}; move the file away, or mend the line"
                ) from error
            end += len(line)
            yield {name: _NON_FINITE.get(v, v) if isinstance(v, str) else v for name, v in row.items()}, end


def _scalar(name: str, value: Metric) -> Scalar:
    if isinstance(value, bool | int | float | str):
        return value
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} has shape {array.shape}; a metric is one number: reduce it before logging")
    return array.item()


def _spelled(value: Scalar) -> Scalar:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            yield prefix + name, value
