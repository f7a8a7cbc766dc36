import jax

from grug_native.kernels.backend import Backend, current_backend


def test_a_cpu_says_neither_capability_nor_memory() -> None:
    assert current_backend() == Backend(jax.default_backend(), None, None)
