"""One of two JAX processes that write one state into buckets: `two PROCESS COORDINATOR URL...`."""

import json
import sys
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grug_native.bucket.run_writer import RunWriter
from grug_native.bucket.saving import Upload, commit_upload
from grug_native.bucket.sharded import copy_to_host
from grug_native.bucket.store import Store

STEP = 3


def make_values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "rows": rng.standard_normal((8, 6)).astype(np.float32),
        "columns": rng.integers(-9, 9, (4, 8)).astype(np.int32),
        "copies": np.asarray(jnp.asarray(rng.standard_normal(5), jnp.bfloat16)),
        "scalar": np.asarray(STEP, np.int32),
    }


def make_state(mesh: Mesh) -> dict[str, dict[str, jax.Array]]:
    """The state, laid out over the axis `data` of a mesh."""
    specs = {"rows": PartitionSpec("data"), "columns": PartitionSpec(None, "data")}
    values = make_values()
    return {
        "params": {
            name: jax.make_array_from_callback(
                array.shape,
                NamedSharding(mesh, specs.get(name, PartitionSpec())),
                lambda index, array=array: array[index],
            )
            for name, array in values.items()
        }
    }


def write(url: str, process: int, mesh: Mesh) -> None:
    store = Store(url)
    writer = RunWriter(store, "run") if process == 0 else None
    drawn = np.zeros(64, np.uint8)
    if writer is not None:
        name = writer.new_name("checkpoints/", STEP).encode()
        drawn[: len(name)] = np.frombuffer(name, np.uint8)
    prefix = bytes(np.asarray(multihost_utils.broadcast_one_to_all(drawn)).tolist()).rstrip(b"\0").decode()
    host = copy_to_host(make_state(mesh))
    upload = Upload(store, prefix, process=process, processes=2, patience=60.0)
    sums = upload.write(host.layouts, host.blocks())
    print(f"{process} wrote {sorted(sums)}", flush=True)
    if writer is not None:
        records, _ = host.records()
        metadata = json.dumps({name: asdict(record) for name, record in records.items()}).encode()
        sha256 = upload.finish(sums, records, lambda: metadata)
        commit_upload(writer, upload, sha256, step=STEP, kind="permanent", segment=lambda: None)
        writer.close()
    else:
        host.records()
    multihost_utils.sync_global_devices("done")


def main() -> None:
    process, coordinator, *urls = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(process))
    mesh = jax.make_mesh((4,), ("data",))
    for url in urls:
        write(url, int(process), mesh)


if __name__ == "__main__":
    main()
