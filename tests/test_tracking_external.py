"""levanter's trackers beside the metrics file: real ones work, broken ones cost a warning."""

import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import pytest
from levanter.tracker.tensorboard import TensorboardConfig
from levanter.tracker.wandb import WandbConfig
from tensorboardX.proto.event_pb2 import Event, SessionLog
from wandb.proto.wandb_internal_pb2 import Record

from grug_native.tracking import external as external_trackers
from grug_native.tracking.jsonl import build_trackers, read_metrics

Fault = Literal["none", "init raises", "init blocks", "log raises", "log blocks", "finish blocks"]


@dataclass
class FaultyTracker:
    """A tracker that keeps what it is told, unless it fails."""

    fault: Fault
    released: threading.Event
    rows: list[tuple[int | None, dict[str, Any]]] = field(default_factory=list[tuple[int | None, dict[str, Any]]])
    hparams: dict[str, Any] = field(default_factory=dict[str, Any])
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    finished: bool = False
    name: str = "faulty"

    def log(self, metrics: Mapping[str, Any], *, step: int | None, commit: bool | None = None) -> None:
        if self.fault == "log raises":
            raise ConnectionError("the server went away")
        if self.fault == "log blocks":
            self.released.wait()
        self.rows.append((step, dict(metrics)))

    def log_hyperparameters(self, hparams: dict[str, Any]) -> None:
        self.hparams = hparams

    def log_summary(self, metrics: dict[str, Any]) -> None:
        self.summary = metrics

    def finish(self) -> None:
        if self.fault == "finish blocks":
            self.released.wait()
        self.finished = True


@dataclass
class FaultyConfig:
    """Makes a `FaultyTracker`, unless it fails."""

    fault: Fault
    released: threading.Event = field(default_factory=threading.Event)
    made: list[FaultyTracker] = field(default_factory=list[FaultyTracker])
    threads: list[threading.Thread] = field(default_factory=list[threading.Thread])

    def init(self, run_id: str | None) -> FaultyTracker:
        self.threads.append(threading.current_thread())
        if self.fault == "init raises":
            raise PermissionError(f"{run_id}: not logged in")
        if self.fault == "init blocks":
            self.released.wait()
        self.made.append(FaultyTracker(self.fault, self.released))
        return self.made[-1]


@pytest.mark.parametrize(
    ("fault", "warning"),
    [
        ("init raises", "could not start"),
        ("init blocks", "did not finish within 0.2 s"),
        ("log raises", "failed, the run goes on: ConnectionError"),
        ("log blocks", "did not finish within 0.2 s"),
        ("finish blocks", "did not finish within 0.2 s"),
    ],
)
def test_a_broken_tracker_costs_a_warning_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Fault, warning: str
) -> None:
    broken, healthy = FaultyConfig(fault), FaultyConfig("none")
    tracker = build_trackers([broken, healthy], tmp_path, "name", start_step=0, finish_timeout=0.2)
    for step in range(20):
        tracker.log({"train/loss": 1.0}, step=step)
    tracker.finish()
    broken.released.set()

    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(20))
    assert [step for step, _ in healthy.made[0].rows] == list(range(20))
    assert healthy.made[0].finished
    naming = [message for message in caplog.messages if message.startswith("FaultyConfig")]
    assert sum(warning in message for message in naming) == 1
    assert naming[1:] == (["FaultyConfig failed 20 times in all"] if fault == "log raises" else [])


def test_a_slow_tracker_is_dropped_from_when_its_queue_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_trackers, "QUEUE_SIZE", 5)
    slow = FaultyConfig("init blocks")
    tracker = build_trackers([slow], tmp_path, "name", start_step=0, finish_timeout=0.1)
    for step in range(12):
        tracker.log({"train/loss": 1.0}, step=step)
    tracker.finish()
    slow.released.set()
    assert "FaultyConfig was too slow: 7 calls were dropped" in caplog.messages
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 12


def test_settings_and_summary_reach_a_tracker_flat_and_plain(tmp_path: Path) -> None:
    config = FaultyConfig("none")
    tracker = build_trackers([config], tmp_path, "name", start_step=0)
    tracker.log_hyperparameters({"model": {"num_layers": 2, "rope": {"theta": 1e4}}, "seed": 0})
    tracker.log_summary({"parameters": jax.numpy.int32(7)})
    tracker.finish()
    assert config.made[0].hparams == {"model.num_layers": 2, "model.rope.theta": 1e4, "seed": 0}
    assert config.made[0].summary == {"parameters": 7}
    assert type(config.made[0].summary["parameters"]) is int


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_start_a_tracker_in_the_order_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    config = FaultyConfig("none")
    build_trackers([config], tmp_path, "name", start_step=0).finish()
    assert (config.threads == [threading.main_thread()]) == (processes == 2)
    assert len(config.threads) == 1


def test_another_process_than_the_first_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tracker = build_trackers((), tmp_path, "name", start_step=0)
    tracker.log({"train/loss": 1.0}, step=0)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def events(logdir: Path) -> Iterator[Event]:
    """Reads TFRecords: a length, its checksum, that many bytes, their checksum."""
    for path in sorted(logdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event()
            event.ParseFromString(data[12 : 12 + length])
            yield event
            data = data[12 + length + 4 :]


def shown_by_tensorboard(logdir: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows: a start of a session at a step hides what was logged at it and later before."""
    shown: list[tuple[int, float]] = []
    for event in events(logdir):
        if event.session_log.status == SessionLog.START:
            shown = [(step, value) for step, value in shown if step < event.step]
        shown += [(event.step, v.simple_value) for v in event.summary.value if v.tag == "train/loss"]
    return shown


def test_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    for start, stop, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        # The name of a file of events has its second in it; here two runs start within one.
        config = TensorboardConfig(logdir=str(tmp_path / "tb"), filename_suffix=f".{start}")
        tracker = build_trackers([config], tmp_path, "name", start_step=start)
        tracker.log_hyperparameters({"seed": 0})
        for step in range(start, stop):
            tracker.log({"train/loss": loss}, step=step)
        tracker.finish()
    expected = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert shown_by_tensorboard(tmp_path / "tb" / "name") == expected


def wandb_records(path: Path) -> Iterator[Record]:
    """Reads wandb's file: LevelDB's log format, records in pieces in blocks of 32 KiB."""
    data, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def test_wandb_offline_keeps_the_run_and_uploads_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start, stop in ((0, 4), (2, 6)):
        tracker = build_trackers([WandbConfig(mode="offline")], tmp_path, "run-7", start_step=start)
        for step in range(start, stop):
            tracker.log({"train/loss": float(step)}, step=step)
        tracker.finish()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    steps: list[list[int]] = []
    for file in files:
        deadline = time.monotonic() + 30  # Its own process may still be writing.
        while not any(record.HasField("exit") for record in wandb_records(file)) and time.monotonic() < deadline:
            time.sleep(0.1)
        records = list(wandb_records(file))
        assert {record.run.run_id for record in records if record.HasField("run")} == {"run-7"}
        steps.append([record.history.step.num for record in records if record.HasField("history")])
    assert steps == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert not list((tmp_path / "wandb").rglob("*.py"))


def test_a_run_whose_wandb_cannot_be_reached_ends_well(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from levanter.tracker.wandb import WandbConfig
from grug_native.tracking.jsonl import build_trackers
config, directory = WandbConfig(mode="online"), pathlib.Path(sys.argv[1])
tracker = build_trackers([config], directory, "name", start_step=0, finish_timeout=1)
for step in range(5):
    tracker.log({"train/loss": 1.0}, step=step)
tracker.finish()
"""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "WANDB_DIR": str(tmp_path),
        "WANDB_BASE_URL": "http://127.0.0.1:1",
        "WANDB_API_KEY": "0" * 40,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert done.stderr.count("WandbConfig did not finish within 1 s") == 1
    assert "Traceback" not in done.stderr
