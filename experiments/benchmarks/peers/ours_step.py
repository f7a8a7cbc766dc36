"""Our compiled step alone, on batches that are on the device. `Turn.calls` is the time from a call to its return.

That is the host's part of a step; of the first one, the whole of it.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peers import ours, shapes
from experiments.benchmarks.peers.shapes import Job
from grug_native.loss import ComputeDtype
from grug_native.mesh import batch_sharding, create_mesh
from grug_native.state import init_train_state
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
        batches = [
            jax.device_put(ours.Batch(jnp.asarray(tokens), jnp.asarray(weight)), batch_sharding(mesh))
            for tokens in np.load(f"{job.folder}/batches.npy")
        ]
        for step, batch in enumerate(batches):
            started = time.perf_counter()
            state, metrics = train_step(optimizer, state, batch, config=config)
            if step == 0:
                jax.block_until_ready(metrics)
            gate.step_done(metrics.loss, time.perf_counter() - started)


if __name__ == "__main__":
    main()
