"""Real runs in real processes, of which only the first pays for its imports, and how to tell that two runs are equal.

A fork server imports everything once, uses no device, and forks a process per run; so a run costs a second or three.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from grug_native.checkpoint.digest import verify_files
from grug_native.checkpoint.metadata import CheckpointMetadata, read_metadata
from grug_native.host.fault_injection import ENV_NAME
from grug_native.host.run_folder import committed_steps
from grug_native.tracking.jsonl import METRICS_FILE, read_metrics

NUM_STEPS = 8

DEADLINE = 120.0
"""Seconds that anything may take on a busy machine before a test gives up."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process of a run."""

    config: Path
    """YAML file of the run."""
    output: Path
    """Where its stdout and stderr go; appended to."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    devices: int = 1
    stop_after: int | None = None
    resume_step: int | None = None
    command: tuple[str, ...] = ()
    """What `grug` is given, in place of the script."""
    directory: Path | None = None
    """Where it works; None leaves it where the tests do."""
    xla_cache: Path | None = None
    """Where it looks for compiled programs; None leaves it where the tests do."""
    largest_file: int | None = None
    """Bytes that a file may have at most."""
    cell: str | None = None
    """What an IPython session runs in place of the script; its `runner` is the run's."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Its exit code; minus the signal that killed it."""
    output: str
    """All it wrote to stdout and stderr."""

    def expect(self, code: int, *words: str) -> str:
        """Asserts how it ended and what it said; returns that."""
        assert self.code == code, f"exit code {self.code} and not {code}:\n{self.output}"
        for word in words:
            assert word in self.output, f"no {word!r} in:\n{self.output}"
        return self.output


class Running:
    """A process under way."""

    def __init__(self, process: ForkServerProcess, output: Path):
        self._process = process
        self._output = output
        self._start = output.stat().st_size if output.exists() else 0
        process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def alive(self) -> bool:
        return self._process.is_alive()

    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.exitcode

    def kill(self) -> None:
        """Ends it, by SIGKILL."""
        self._process.kill()
        self._process.join()

    def output(self) -> str:
        return self._output.read_bytes()[self._start :].decode() if self._output.exists() else ""

    def until(self, condition: Callable[[], object]) -> None:
        """Waits until something is so; fails if the process ends before it."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self._process.is_alive(), f"it ended early:\n{self.output()}"
            assert time.monotonic() < deadline, f"it takes too long:\n{self.output()}"
            time.sleep(0.01)

    def until_said(self, word: str) -> None:
        """Waits until the process has written `word`."""
        self.until(lambda: word in self.output())

    def wait(self, seconds: float = DEADLINE) -> Ended:
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"it had not ended after {seconds} s:\n{self.output()}")
        return Ended(self._process.exitcode, self.output())


type Digests = Mapping[str, str]
type Record = list[tuple[object, ...]]


@dataclass(frozen=True)
class Run:
    """A run's folder, and processes that work on it."""

    server: "ForkServer"
    config: Path
    folder: Path
    devices: int = 1

    def edit(self, changes: Mapping[str, Any]) -> "Run":
        """Changes dotted fields of the config file."""
        raw = yaml.safe_load(self.config.read_text())
        for name, value in changes.items():
            *sections, field = name.split(".")
            section = raw
            for part in sections:
                section = section[part]
            section[field] = value
        self.config.write_text(yaml.safe_dump(raw, sort_keys=False))
        return self

    def start(self, fault: str | None = None, **settings: Any) -> Running:
        """Starts a process of the run; `settings` are fields of its `Job`."""
        job = Job(config=self.config, output=self.folder.with_suffix(".log"), devices=self.devices)
        job = replace(job, **settings)
        return self.server.start(
            job if fault is None else replace(job, environment={**job.environment, ENV_NAME: fault})
        )

    def fit(self, fault: str | None = None, **settings: Any) -> Ended:
        """Runs a process of the run to its end."""
        return self.start(fault, **settings).wait()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, newest first."""
        return committed_steps(self.checkpoints)

    def step(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def metadata(self, step: int) -> CheckpointMetadata:
        return read_metadata(self.step(step))

    def names(self) -> list[str]:
        """What lies in the checkpoints folder."""
        return sorted(path.name for path in self.checkpoints.iterdir())

    def record(self) -> Record:
        """What must be equal, byte for byte, however often a run was interrupted: a row a step."""
        return record_of(self.folder / METRICS_FILE)

    def digests(self) -> Digests:
        """Digests of the arrays of the newest checkpoint, which its files are proven to hold."""
        newest = self.step(self.steps[0])
        metadata = read_metadata(newest)
        assert verify_files(newest, metadata) == []
        return {name: leaf.digest for name, leaf in metadata.leaves.items()}

    def size(self) -> int:
        """Bytes of all files in the run's folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def expect_equal(self, other: "Run") -> None:
        """Asserts that this run ended as the other did, step by step and bit by bit."""
        assert self.record() == other.record()
        assert (self.steps[0], self.digests()) == (other.steps[0], other.digests())


def record_of(metrics: Path) -> Record:
    """Of a `metrics.jsonl`: what must be equal, byte for byte, however often a run was interrupted; a row a step."""
    keys = ("train/loss", "optim/learning_rate", "grad/norm/total", "data/batch_digest", "mixture/stage")
    found: Record = []
    for row in read_metrics(metrics):
        evals = [name for name in sorted(row) if name.startswith("eval/") and not name.endswith("_time")]
        found.append((row["step"], *(_exact(row.get(key)) for key in keys), [(n, _exact(row[n])) for n in evals]))
    return found


def _exact(value: object) -> object:
    return value.hex() if isinstance(value, float) else value


class ForkServer:
    """Forks processes that have imported all they need; and keeps the corpus they share."""

    def __init__(self, folder: Path):
        """Starts the server, and makes the base configs in `folder`."""
        self._folder = folder
        folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        assert isinstance(context, ForkServerContext)
        self._context = context
        context.set_forkserver_preload(["tests.faults.runs", "tests.faults.child"])
        process = context.Process(target=_make_base_runs, args=(folder,))
        process.start()
        process.join(DEADLINE)
        assert process.exitcode == 0

    def run(
        self, folder: Path, changes: Mapping[str, Any] | None = None, *, base: str = "plain", devices: int = 1
    ) -> Run:
        """A run in `folder`, with dotted fields of the base config changed."""
        config = folder.with_suffix(".yaml")
        shutil.copy(self._folder / f"{base}.yaml", config)
        run = Run(self, config, folder, devices)
        return run.edit({"output_path": str(folder), "trainer.run_id": "run"} | dict(changes or {}))

    def copy(self, run: Run, folder: Path) -> Run:
        """A copy of a run with all that is in its folder."""
        shutil.copytree(run.folder, folder, symlinks=True)
        shutil.copy(run.config, folder.with_suffix(".yaml"))
        return replace(run, config=folder.with_suffix(".yaml"), folder=folder).edit({"output_path": str(folder)})

    def corpus(self) -> Path:
        """Where the corpus of the plain runs is. Not to be written to."""
        return self._folder / "corpus-plain"

    def start(self, job: Job) -> Running:
        """Starts a process."""
        return Running(self._context.Process(target=_fit, args=(job,)), job.output)


def _fit(job: Job) -> None:
    from tests.faults import child

    child.fit(job)


def _make_base_runs(folder: Path) -> None:
    from tests.faults import child

    child.make_base_runs(folder)


def two_environments() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Environments of processes 0 and 1 of a run on this machine; the first one is the coordinator."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    return shared | {"JAX_PROCESS_ID": "0"}, shared | {"JAX_PROCESS_ID": "1"}
