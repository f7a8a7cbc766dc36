"""What a save of half a gigabyte costs in a bucket and on a disk: `experiments.benchmarks.bucket_saves --url URL`.

In turn: a save on a disk, one in the bucket, and a copy of as many bytes by the store's own client (fsspec's gcsfs or
s3fs, a file for each array of the state). Of a save, what it blocks the loop, what the next step takes longer (on a CPU
it has to make room beside what is saved), and the whole of it: written, read back, compared, committed. The bucket is
found as a run finds it, by the environment.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measure import interleave, show, write_numbers
from grug_native import AdamWConfig, GrugModelConfig, GrugOptimizer, GrugTrainState, create_mesh, init_train_state
from grug_native.bucket.checkpointer import BucketCheckpointer
from grug_native.checkpoint.checkpointer import CheckpointPolicy, GrugCheckpointer
from grug_native.checkpoint.metadata import RunIdentity

MODEL = GrugModelConfig(
    vocab_size=8192,
    hidden_dim=640,
    intermediate_dim=1728,
    num_layers=6,
    num_heads=10,
    num_kv_heads=10,
    max_seq_len=512,
)
"""40 million parameters: 482 MB with AdamW's moments."""


type Seconds = tuple[float, float, float]
"""That a save blocked the loop; that the next step took longer; until all was committed."""


def main(argv: Sequence[str] | None = None, model: GrugModelConfig = MODEL) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, a folder of no run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    identity = RunIdentity("saves", {}, data_fingerprint="random", tokenizer_digest="none", mesh={})
    with (
        tempfile.TemporaryDirectory() as folder,
        jax.set_mesh(create_mesh(jax.device_count())),
        GrugCheckpointer(Path(folder) / "disk", identity, CheckpointPolicy()) as disk,
        BucketCheckpointer(arguments.url, Path(folder) / "bucket", identity, CheckpointPolicy()) as bucket,
    ):
        state = init_train_state(model, GrugOptimizer(AdamWConfig(), 100), key=jax.random.key(0))
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(state)]
        contenders: dict[str, Callable[[], Seconds]] = {
            "disk": _saves(disk, jax.tree.map(jnp.copy, state)),
            "bucket": _saves(bucket, state),
            "copy": _copies(arguments.url, Path(folder) / "files", sizes),
        }
        interleave(contenders, 1)  # compiles the digests, and opens connections
        measured = interleave(contenders, arguments.rounds)
    call, after, whole = (
        {name: statistics.median(seconds[of] for seconds in rounds) for name, rounds in measured.items()}
        for of in range(3)
    )
    stall = {name: call[name] + after[name] for name in call}
    numbers = {
        "state [MB]": sum(sizes) / 1e6,
        "blocked, disk [ms]": 1e3 * call["disk"],
        "blocked, bucket [ms]": 1e3 * call["bucket"],
        "next step longer, disk [ms]": 1e3 * after["disk"],
        "next step longer, bucket [ms]": 1e3 * after["bucket"],
        "stall, bucket / disk (bar: 1)": stall["bucket"] / stall["disk"],
        "whole, disk [s]": whole["disk"],
        "whole, bucket [s]": whole["bucket"],
        "copy by the store's client [s]": whole["copy"],
        "whole, bucket / copy (bar: 1.5)": whole["bucket"] / whole["copy"],
    }
    show(f"{arguments.rounds} rounds, medians", ("", "value"), list(numbers.items()))
    if arguments.json is not None:
        write_numbers(arguments.json, numbers)


@partial(jax.jit, donate_argnums=0)
def _step(state: GrugTrainState) -> GrugTrainState:
    """Writes to all of the memory that it is given, as a training step does, and computes next to nothing."""
    return jax.tree.map(lambda leaf: leaf * 2 if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, state)


def _saves(checkpointer: GrugCheckpointer | BucketCheckpointer, state: GrugTrainState) -> Callable[[], Seconds]:
    """Returns what saves once, and takes a step before and after."""
    number = 0

    def timed_step() -> float:
        nonlocal state
        started = time.perf_counter()
        state = jax.block_until_ready(_step(state))
        return time.perf_counter() - started

    def save() -> Seconds:
        nonlocal number
        number += 1
        alone = timed_step()
        started = time.perf_counter()
        checkpointer.save_temporary_checkpoint(state, step=number, data_offset=number)
        blocked = time.perf_counter() - started
        after = timed_step() - alone
        checkpointer.wait()
        return blocked, after, time.perf_counter() - started

    return save


def _copies(url: str, files: Path, sizes: Sequence[int]) -> Callable[[], Seconds]:
    files.mkdir()
    for number, size in enumerate(sizes):
        (files / str(number)).write_bytes(np.random.default_rng(number).bytes(size))
    system, place = fsspec.core.url_to_fs(f"{url}/copied")

    def copy() -> Seconds:
        started = time.perf_counter()
        system.put(f"{files}/", f"{place}/", recursive=True)
        seconds = time.perf_counter() - started
        return 0.0, 0.0, seconds

    return copy


if __name__ == "__main__":
    main()
