"""What the devices of this process are, as far as a choice of kernels wants to know."""

from typing import NamedTuple

import jax


class Backend(NamedTuple):
    """The kind of the devices, which are all alike."""

    name: str
    """`cpu`, `gpu` or `tpu`."""
    cuda_capability: tuple[int, int] | None = None
    """Compute capability of an NVIDIA GPU: (8, 0) is an A100, (9, 0) an H100 or H200; None for everything else."""
    memory: int | None = None
    """Bytes that a device has for arrays; None where it does not tell (a CPU)."""


def current_backend() -> Backend:
    """The backend that JAX computes on by default."""
    name, device = jax.default_backend(), jax.local_devices()[0]
    stats = device.memory_stats() or {}
    capability = None
    if name == "gpu" and "cuda" in device.client.platform_version:
        major, minor = map(int, str(device.compute_capability).split("."))
        capability = major, minor
    return Backend(name, capability, stats.get("bytes_limit"))
