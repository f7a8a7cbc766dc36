"""Runs of the trainer in a bucket, in processes of their own, and what they have come to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grug_native.bucket.place import fetched
from grug_native.bucket.reading import BucketCheckpoints
from grug_native.bucket.run_head import RunHead
from grug_native.bucket.run_writer import read_head
from grug_native.bucket.store import Store
from grug_native.tracking.jsonl import METRICS_FILE
from tests.bucket.servers import Bucket
from tests.faults.runs import Digests, Ended, ForkServer, Record, Run, Running, record_of


@dataclass(frozen=True)
class BucketRun:
    """A run in a bucket; this process finds it by its own environment."""

    url: str
    bucket: Bucket | None
    """The server; None where the environment of this process leads to the store."""
    run: Run
    """Its config, and the log of its processes."""

    def start(self, fault: str | None = None, **settings: Any) -> Running:
        """Starts a process of the run."""
        given: Mapping[str, str] = settings.pop("environment", {})
        own = {} if self.bucket is None else self.bucket.environment()
        return self.run.start(fault, environment={**own, **given}, **settings)

    def fit(self, fault: str | None = None, **settings: Any) -> Ended:
        """Runs a process of the run to its end."""
        return self.start(fault, **settings).wait()

    def grug(self, *words: str) -> Ended:
        """Runs a command to its end."""
        return self.fit(command=words)

    @property
    def head(self) -> RunHead:
        head = read_head(Store(self.url))
        assert head is not None
        return head

    @property
    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first; none if there is no run yet."""
        head = read_head(Store(self.url))
        return [] if head is None else head.steps

    def record(self) -> Record:
        return record_of(fetched(self.url, [METRICS_FILE]) / METRICS_FILE)

    def digests(self) -> Digests:
        """Digests of the arrays of the newest checkpoint, which its objects are proven to hold."""
        newest = BucketCheckpoints(Store(self.url)).find(None)
        metadata = newest.read_metadata()
        assert newest.verify(metadata) == []
        return {name: leaf.digest for name, leaf in metadata.leaves.items()}

    def expect_equal(self, whole: Run) -> None:
        """Asserts that it has come to what an undisturbed run on a disk has, step by step and bit by bit."""
        assert self.record() == whole.record()
        assert (self.steps[-1], self.digests()) == (whole.steps[0], whole.digests())
        assert self.head.owner is None

    def leftovers(self) -> list[str]:
        """Names of what is in the bucket, and belongs to nothing."""
        known = self.head.names()
        keys = [key for folder in ("checkpoints/", "log/", "files/") for key in Store(self.url).list(folder)]
        return [key for key in keys if not key.startswith(tuple(known))]


def bucket_run(
    server: ForkServer, bucket: Bucket, folder: Path, changes: Mapping[str, Any] | None = None, *, base: str = "plain"
) -> BucketRun:
    """A run in a folder of the bucket that nobody has used."""
    url = bucket.new_folder()
    return BucketRun(url, bucket, server.run(folder, {"output_path": url} | dict(changes or {}), base=base))


def again(run: BucketRun, changes: Mapping[str, Any]) -> BucketRun:
    """The same run by a changed config."""
    return replace(run, run=run.run.edit(changes))


def rows(run: BucketRun) -> list[dict[str, Any]]:
    """The lines of its record as they are."""
    return [json.loads(line) for line in (fetched(run.url, [METRICS_FILE]) / METRICS_FILE).read_text().splitlines()]
