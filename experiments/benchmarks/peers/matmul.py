"""The most that products of f32 matrices reach here. Its `Turn.values` are operations per second."""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peers import ours
from experiments.benchmarks.peers.shapes import Job


def best_flops(size: int) -> float:
    """The better of NumPy's and JAX's product of two square matrices."""
    host = np.random.default_rng(0).random((2, size, size), np.float32)
    device = jnp.asarray(host)
    product = jax.jit(jnp.matmul)

    def seconds(call: Callable[[], object]) -> float:
        jax.block_until_ready(call())
        started = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - started

    return 2 * size**3 / min(seconds(lambda: product(device[0], device[1])), seconds(lambda: host[0] @ host[1]))


def main() -> None:
    """Measures until the parent has enough."""
    sizes = (256,) if Job.read(sys.argv[1]).shape == "toy" else (2048, 3072)
    gate = ours.open_gate()
    while True:
        started = time.perf_counter()
        value = max(map(best_flops, sizes))
        gate.step_done(value, time.perf_counter() - started)


if __name__ == "__main__":
    main()
