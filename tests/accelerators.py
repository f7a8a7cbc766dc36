"""Tracing and lowering for accelerators that are not here: what the process is told of its devices."""

from collections.abc import Generator
from contextlib import contextmanager

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from grug_native import attention, components, layers, loss, microbatches, plan, train
from grug_native.kernels import backend
from grug_native.kernels.backend import Backend

CPU = Backend("cpu")
HOPPER = Backend("gpu", (9, 0), 80 * 2**30)
AMPERE = Backend("gpu", (8, 0), 40 * 2**30)
TURING = Backend("gpu", (7, 5), 16 * 2**30)
TPU = Backend("tpu", None, 16 * 2**30)

PLATFORM = {"gpu": "cuda", "tpu": "tpu"}
"""Name of a backend -> what `lower(lowering_platforms=...)` calls it."""


@contextmanager
def pretend(device: Backend) -> Generator[None]:
    """Lets all that asks for the devices' kind see `device`; what is traced before and after is forgotten."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, backend, components, layers, loss, microbatches, plan, train):
            patch.setattr(module, "current_backend", lambda: device)
        patch.setattr(jax, "default_backend", lambda: device.name)
        capability = device.cuda_capability or (0, 0)
        patch.setattr(fused, "check_compute_capability", lambda wanted: capability >= _parsed(wanted))
        patch.setattr(fused, "is_cuda_compute_capability_equal", lambda wanted: capability == _parsed(wanted))
        patch.setattr(fused, "check_cudnn_version", lambda: 91500)
        yield
    jax.clear_caches()


def _parsed(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
