import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_native.rotary import GrugRopeConfig, apply_rotary, rotary_tables
from tests.tolerance import assert_close

TABLES = rotary_tables(GrugRopeConfig(theta=100.0), 8, jnp.arange(64))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 40), st.integers(0, 23), st.integers(0, 1000))
def test_products_depend_on_the_distance_alone(distance: int, shift: int, seed: int) -> None:
    q, k = np.asarray(jax.random.normal(jax.random.key(seed), (2, 8)))
    turned_q = apply_rotary(jnp.broadcast_to(q, (1, 64, 1, 8)), *TABLES)[0, :, 0]
    turned_k = apply_rotary(jnp.broadcast_to(k, (1, 64, 1, 8)), *TABLES)[0, :, 0]
    here, there = turned_q[distance] @ turned_k[0], turned_q[distance + shift] @ turned_k[shift]
    # An angle of up to 64 radians is rounded as such a number is, whatever is left of it by the sine.
    size = np.linalg.norm(q) * np.linalg.norm(k)
    assert_close(here, there, terms=8, magnitude=64 * size)
    assert_close(np.linalg.norm(turned_q, axis=1), np.full(64, np.linalg.norm(q)), terms=2 * 8)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan")])
def test_a_base_that_is_no_base_is_refused(theta: float) -> None:
    with pytest.raises(ValueError, match=r"model\.rope\.theta=.* must be positive"):
        GrugRopeConfig(theta=theta)


def test_llama3_scaling_stretches_long_waves_only() -> None:
    rope = GrugRopeConfig(theta=10_000.0, llama3_factor=8.0, original_max_seq_len=64)
    plain, scaled = rotary_tables(GrugRopeConfig(), 64, jnp.arange(2)), rotary_tables(rope, 64, jnp.arange(2))
    angles = np.arcsin(plain[1][1]), np.arcsin(scaled[1][1])
    wavelength = 2 * np.pi / angles[0]
    short, long = wavelength < 64 / 4, wavelength > 64
    # A power of theta is off by its logarithm's rounding.
    ratio, power = angles[1] / angles[0], np.log(10_000)
    assert_close(ratio[short], np.ones(short.sum()), terms=4, magnitude=power)
    assert_close(ratio[long], np.full(long.sum(), 1 / 8), terms=4, magnitude=power / 8)
    between = ~short & ~long
    assert ((angles[1] < angles[0]) & (angles[1] > angles[0] / 8))[between].all()
