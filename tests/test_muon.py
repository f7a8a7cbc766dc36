from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_native.muon import orthogonalize, per_matrix, scale_by_muon
from grug_native.sharding import MeshAxes, create_mesh
from tests.tolerance import assert_close, tolerance

SLOPE = 3.4445
"""By how much a step of the iteration enlarges a singular value near 0."""


@settings(deadline=None, max_examples=20)
@given(st.sampled_from((1, 4, 12)), st.sampled_from((1, 5, 12)), st.integers(0, 100))
def test_orthogonalize_keeps_singular_vectors_and_evens_values(rows: int, columns: int, seed: int) -> None:
    matrix = np.asarray(jax.random.normal(jax.random.key(seed), (rows, columns)), np.float64)
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    result = np.asarray(jax.jit(partial(orthogonalize, steps=5))(jnp.asarray(matrix, jnp.float32)))
    mapped = u.T @ result @ vt.T
    off = mapped - np.diag(np.diag(mapped))
    # Of a value near 0, the first step and its rounding grow by the polynomial's slope, step by step.
    assert np.abs(off).max(initial=0) < tolerance(3 * 12, SLOPE**5)
    large = values > 0.05 * values.max()
    assert ((np.diag(mapped)[large] > 0.5) & (np.diag(mapped)[large] < 1.3)).all()


def test_muon_deals_out_its_layers_even_where_they_do_not_divide() -> None:
    transform = scale_by_muon(0.95, 5)

    def flops(layers: int, devices: int) -> float:
        with jax.set_mesh(create_mesh(devices, MeshAxes(), devices=jax.devices()[:devices])):
            grads = jnp.ones((layers, 64, 64), out_sharding=jax.P(None, "data", None))
            cost = jax.jit(transform.update).lower(grads, transform.init(grads)).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    one_layer = flops(1, 1)
    assert flops(3, 4) < 1.3 * one_layer
    assert flops(5, 4) < 2.3 * one_layer


def test_a_function_of_whole_matrices_is_the_same_on_a_mesh_of_experts() -> None:
    stack = jax.random.normal(jax.random.key(0), (3, 4, 8, 6))
    whole = per_matrix(lambda matrices: matrices / jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True))
    expected = whole(stack)
    with jax.set_mesh(create_mesh(4, MeshAxes(data=2, expert=2))):
        spread = jax.device_put(stack, jax.P(None, "expert", "data", None))
        found = jax.jit(whole)(spread)
        assert jax.typeof(found).sharding.spec == jax.P(None, "expert", "data", None)
        one = jax.jit(whole)(jax.device_put(stack[0, 0], jax.P("data", None)))
    assert_close(found, expected, terms=48)
    assert_close(one, expected[0, 0], terms=48)
