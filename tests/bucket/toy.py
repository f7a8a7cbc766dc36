"""A run of some numpy arrays in a bucket: what a trainer does with the room's classes, in a hundredth of the time.

Its processes are forked from a server that has imported all of it, and has opened no store.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np

from grug_native.bucket.arrays import Block, BucketReader, Layout, layout, read_verified
from grug_native.bucket.record import Record, committed_record
from grug_native.bucket.run_head import CheckpointEntry, RunHead
from grug_native.bucket.run_writer import RunWriter, read_head
from grug_native.bucket.saving import (
    Upload,
    commit_upload,
    entry_store,
    read_metadata_object,
    restore_newest,
    store_for,
    temporary_store,
)
from grug_native.bucket.store import Retries, Store, check_store
from grug_native.checkpoint.digest import host_digest
from grug_native.checkpoint.metadata import CheckpointKind, LeafRecord
from grug_native.host.run_folder import RunLockedError

QUICK = Retries(first_pause=0.02, longest_pause=0.1, attempts=4)
STEPS = 6
SHARDS = 2
DEADLINE = 60.0

State = dict[str, np.ndarray]


def first_state() -> State:
    rows = np.arange(24, dtype=np.float32).reshape(6, 4)
    return {"params.w": rows, "params.b": np.zeros(4, np.int32), "step": np.asarray(0, np.int32)}


def next_state(state: State) -> State:
    step = state["step"] + 1
    w = (state["params.w"] * np.float32(1.25) + np.float32(step)).astype(np.float32)
    return {"params.w": w, "params.b": state["params.b"] + np.int32(step), "step": np.asarray(step, np.int32)}


def records(state: State) -> dict[str, LeafRecord]:
    return {n: LeafRecord(a.shape, a.dtype.name, None, host_digest(a)) for n, a in state.items()}


def blocks_of(state: State) -> tuple[dict[str, Layout], list[Block]]:
    """As if `params.w` were on two devices."""
    layouts: dict[str, Layout] = {}
    blocks: list[Block] = []
    for name, record in records(state).items():
        array, parts = state[name], SHARDS if name == "params.w" else 1
        rows = len(array) // parts if parts > 1 else 0
        shard = (rows, *array.shape[1:]) if parts > 1 else array.shape
        layouts[name] = layout(record, shard)
        for part in range(parts):
            start = (part * rows, *(0 for _ in array.shape[1:])) if parts > 1 else (0,) * array.ndim
            blocks.append(Block(name, start, array[part * rows : (part + 1) * rows] if parts > 1 else array))
    return layouts, blocks


def save(writer: RunWriter, record: Record | None, state: State, kind: CheckpointKind = "permanent") -> RunHead:
    """Commits a checkpoint, and the record until then."""
    step = int(state["step"])
    upload = Upload(store_for(writer, kind), writer.new_name("checkpoints/", step), patience=writer.patience)
    try:
        layouts, blocks = blocks_of(state)
        known = records(state)
        body = {n: [list(r.shape), r.dtype, r.digest] for n, r in known.items()}
        metadata = json.dumps({"step": step, "leaves": body}).encode()
        sha256 = upload.finish(upload.write(layouts, blocks), known, lambda: metadata)
        return commit_upload(
            writer, upload, sha256, step=step, kind=kind, segment=lambda: record.segment(step) if record else None
        )
    except BaseException:
        writer.give_up(upload.store, upload.prefix)
        raise


def load(run: Store, entry: CheckpointEntry) -> State:
    body = json.loads(read_metadata_object(run, entry))
    reader = BucketReader(entry_store(run, entry), entry.prefix)
    known = {n: LeafRecord(tuple(shape), dtype, None, digest) for n, (shape, dtype, digest) in body["leaves"].items()}
    return {name: read_verified(reader, name, record) for name, record in known.items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process of a run."""

    url: str
    environment: Mapping[str, str]
    steps: int = STEPS
    lease: float = 30.0
    patience: float = 20.0
    publish_every: float = 30.0
    temporary_root: str | None = None
    keep: int = 2
    pause: float = 0.0
    """Seconds in a step."""
    marks: Path | None = None
    """A file that is appended to: a line a step."""


def train(job: Job) -> None:
    """The whole run."""
    store = Store(job.url, retries=QUICK)
    check_store(store)
    temporary = None if job.temporary_root is None else temporary_store(job.temporary_root, "toy", store)
    scratch = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    with RunWriter(store, "toy", temporary=temporary, lease=job.lease, patience=job.patience) as writer:
        state = restore_newest(writer, lambda entry: load(store, entry))
        state = first_state() if state is None else state
        writer.record(None, [writer.put_file("config.yaml", b"steps: 6\n")])
        with Record(writer, scratch, publish_every=job.publish_every) as record, scratch.open("ab", buffering=0) as log:
            while (step := int(state["step"])) < job.steps:
                writer.check()
                log.write(json.dumps({"step": step, "train/loss": float(state["params.w"].sum())}).encode() + b"\n")
                state = next_state(state)
                time.sleep(job.pause)
                if job.marks:
                    with job.marks.open("a") as marks:
                        marks.write(f"{step}\n")
                if (step + 1) % 2 == 0:
                    kind: CheckpointKind = (
                        "permanent" if (step + 1) % 4 == 0 or job.temporary_root is None else "temporary"
                    )
                    save(writer, record, state, kind)
                    writer.retire(writer.head.checkpoints[: -job.keep])
            log.write(json.dumps({"step": step, "eval/loss": 1.5}).encode() + b"\n")


@dataclass(frozen=True)
class Outcome:
    """What a run came to: everything that must be the same however often it was interrupted."""

    record: bytes
    metrics: bytes
    steps: list[int]
    state: dict[str, bytes]


def outcome(url: str) -> Outcome:
    store = Store(url, retries=QUICK)
    head = read_head(store)
    assert head is not None and head.owner is None, head
    metrics = store.get("metrics.jsonl")
    assert metrics is not None
    state = load(store, head.checkpoints[-1])
    return Outcome(committed_record(store, head), metrics.data, head.steps, {n: a.tobytes() for n, a in state.items()})


def _child(job: Job, go: Connection, output: Path) -> None:
    with output.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    os.environ.update(job.environment)
    go.recv()
    try:
        train(job)
    except RunLockedError as error:
        print(f"LOCKED: {type(error).__name__}: {error}", flush=True)
        os._exit(4)


class Server:
    """Forks processes of toy runs."""

    def __init__(self, folder: Path):
        context = multiprocessing.get_context("forkserver")
        assert isinstance(context, ForkServerContext)
        context.set_forkserver_preload(["tests.bucket.toy"])
        self._context, self._folder = context, folder
        self._count = 0

    def start(self, job: Job, *, before: Callable[[int], object] | None = None) -> "Running":
        """Starts a process; `before` is told its pid before it does anything."""
        self._count += 1
        output = self._folder / f"{self._count}.log"
        here, there = self._context.Pipe()
        process = self._context.Process(target=_child, args=(job, there, output))
        process.start()
        assert process.pid is not None
        if before is not None:
            before(process.pid)
        here.send(None)
        return Running(process, process.pid, output)

    def run(self, job: Job, *, before: Callable[[int], object] | None = None) -> "Running":
        """Runs a process to its end."""
        running = self.start(job, before=before)
        running.wait()
        return running


@dataclass
class Running:
    """A process under way."""

    process: ForkServerProcess
    pid: int
    log: Path
    code: int | None = field(default=None)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = DEADLINE) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it had not ended after {seconds} s:\n{self.output}")
        self.code = self.process.exitcode
        return self.code

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.join()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def expect(self, code: int, *words: str) -> str:
        assert self.code == code, f"exit code {self.code} and not {code}:\n{self.output}"
        for word in words:
            assert word in self.output, f"no {word!r} in:\n{self.output}"
        return self.output


def until(condition: Callable[[], Any], seconds: float = DEADLINE) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def at_once[Result](*actions: Callable[[], Result]) -> list[Result]:
    """Does all at once."""
    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(action) for action in actions]]
