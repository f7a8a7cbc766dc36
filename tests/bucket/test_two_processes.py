"""Two JAX processes of two devices each write one state; one process reads it on other meshes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grug_native.bucket.arrays import BucketReader
from grug_native.bucket.run_writer import read_head
from grug_native.bucket.saving import read_metadata_object
from grug_native.bucket.sharded import load_arrays
from grug_native.bucket.store import Store
from grug_native.checkpoint.leaves import Leaf, prove_leaves
from grug_native.checkpoint.metadata import LeafRecord
from tests.bucket.servers import Bucket, free_port
from tests.bucket.toy import QUICK
from tests.bucket.two import STEP, make_values

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written(gcs: Bucket, s3: Bucket, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of a run that two processes wrote into both stores."""
    urls = {bucket.scheme: bucket.new_folder("two") for bucket in (gcs, s3)}
    coordinator, logs = f"127.0.0.1:{free_port()}", tmp_path_factory.mktemp("two")
    environment = os.environ | gcs.environment() | s3.environment() | {"JAX_NUM_CPU_DEVICES": "2"}
    processes: list[subprocess.Popen[bytes]] = []
    for index in range(2):
        with (logs / f"{index}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.bucket.two", str(index), coordinator, *urls.values()]
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    for index, process in enumerate(processes):
        assert process.wait(120) == 0, (logs / f"{index}.log").read_text()
    for index, words in enumerate(
        ("columns', 'params.copies', 'params.rows', 'params.scalar'", "columns', 'params.rows'")
    ):
        assert f"{index} wrote ['params.{words}]" in (logs / f"{index}.log").read_text()
    return urls


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4)])
def test_the_state_is_read_on_another_mesh(bucket: Bucket, written: dict[str, str], shape: tuple[int, int]) -> None:
    store = Store(written[bucket.scheme], retries=QUICK)
    head = read_head(store)
    assert head is not None and head.steps == [STEP] and head.owner is None
    entry = head.checkpoints[0]
    raw = json.loads(read_metadata_object(store, entry))
    records = {n: LeafRecord(tuple(r["shape"]), r["dtype"], r["key_impl"], r["digest"]) for n, r in raw.items()}
    assert len(store.list(f"{entry.prefix}params/rows/c/")) == 4
    mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])
    specs = {"params.rows": PartitionSpec("model", "data"), "params.columns": PartitionSpec("data")}
    wanted: dict[str, Leaf] = {
        n: jax.ShapeDtypeStruct(r.shape, r.dtype, sharding=NamedSharding(mesh, specs.get(n, PartitionSpec())))
        for n, r in records.items()
    }
    loaded = prove_leaves(load_arrays(BucketReader(store, entry.prefix), records, wanted), records)
    for name, array in make_values().items():
        assert np.asarray(loaded[f"params.{name}"]).tobytes() == array.tobytes()
