"""Our compiled step alone, on batches that are on the device. `Turn.calls` is the time from a call to its return.

That is the host's part of a step; of the first one, the whole of it. Arguments after the job and the module's name:
`packed` for rows of several documents, and `profile=FOLDER:FIRST:STEPS` for a trace of those steps.
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peers import ours, shapes
from experiments.benchmarks.peers.shapes import Job
from grug_native.loss import ComputeDtype
from grug_native.sharding import batch_sharding, create_mesh
from grug_native.state import init_train_state
from grug_native.tracking.profile import TABLE_FILE, kernel_table, read_trace, tracing
from grug_native.train import GrugStepConfig, train_step


def main() -> None:
    """Runs steps until the parent has enough."""
    job = Job.read(sys.argv[1])
    gate = ours.open_gate(job.cpu_devices)
    shape, optimizer = job.sizes, ours.optimizer()
    dtype: ComputeDtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = GrugStepConfig(compute_dtype=dtype)
    mesh = create_mesh(shape.batch_size)
    weight = np.ones((shape.batch_size, shape.seq_len), np.float32)
    weight[:, -1] = 0
    with jax.set_mesh(mesh):
        state = init_train_state(ours.model_config(shape, **job.model), optimizer, key=jax.random.key(shapes.SEED))
        rows = np.load(f"{job.folder}/batches.npy")
        segments = np.load(f"{job.folder}/segments.npy") if "packed" in sys.argv else [None] * len(rows)
        batches = [
            jax.device_put(ours.Batch(jnp.asarray(tokens), jnp.asarray(weight), _mask(documents)), batch_sharding(mesh))
            for tokens, documents in zip(rows, segments, strict=True)
        ]
        folder, first, steps = _profile()
        traced = ExitStack()
        for step, batch in enumerate(batches):
            if step == first:
                jax.block_until_ready(state)
                traced.enter_context(tracing(folder))
            started = time.perf_counter()
            state, metrics = train_step(optimizer, state, batch, config=config)
            if step == 0:
                jax.block_until_ready(metrics)
            called = time.perf_counter() - started
            if step == first + steps - 1:
                jax.block_until_ready(state)
                traced.close()
                (folder / TABLE_FILE).write_text(kernel_table(read_trace(folder), steps))
            gate.step_done(metrics.loss, called)


def _mask(documents: np.ndarray | None) -> ours.CausalMask:
    if documents is None:
        return ours.CausalMask()
    ids = jnp.asarray(documents)
    return ours.CausalMask(segment_ids=(ids, ids))


def _profile() -> tuple[Path, int, int]:
    asked = [word.removeprefix("profile=") for word in sys.argv if word.startswith("profile=")]
    folder, first, steps = asked[0].rsplit(":", 2) if asked else ("", -1, 0)
    return Path(folder), int(first), int(steps)


if __name__ == "__main__":
    main()
