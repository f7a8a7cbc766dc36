from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_native.checkpoint.leaves import (
    check_leaves,
    leaf_records,
    named_leaves,
    state_bytes,
    stored_arrays,
    with_leaves,
)
from grug_native.checkpoint.metadata import CheckpointMismatchError
from tests.small_state import make_state, state_shape


def test_every_array_has_a_dotted_name() -> None:
    names = list(named_leaves(make_state(ema=True)))
    assert names == [
        "step",
        "params.embed",
        "params.bias",
        "opt_state.0.count",
        "opt_state.0.mu.embed",
        "opt_state.0.mu.bias",
        "opt_state.0.nu.embed",
        "opt_state.0.nu.bias",
        "training_key",
        "ema_params.embed",
        "ema_params.bias",
    ]
    assert "ema_params.embed" not in named_leaves(make_state())


def test_a_state_is_rebuilt_from_its_leaves() -> None:
    state, other = make_state(3), make_state(4)
    leaves = {name: leaf for name, leaf in named_leaves(other).items() if isinstance(leaf, jax.Array)}
    assert eqx.tree_equal(with_leaves(state, leaves), other)
    assert eqx.tree_equal(with_leaves(state_shape(), leaves), other)


def test_an_abstract_state_asks_for_what_a_concrete_one_has() -> None:
    assert leaf_records(named_leaves(state_shape(ema=True))) == leaf_records(named_leaves(make_state(ema=True)))
    record = leaf_records(named_leaves({"key": jax.random.key(0, impl="rbg")}))["key"]
    assert (record.shape, record.dtype, record.key_impl) == ((4,), "uint32", "rbg")


def test_functions_are_code() -> None:
    tree = {"activation": jax.nn.relu, "w": jnp.ones(2)}
    assert list(named_leaves(tree)) == ["w"]
    assert with_leaves(tree, {"w": jnp.zeros(2)})["activation"] is jax.nn.relu


@pytest.mark.parametrize("leaf", [1.0, 3, True, "text", np.float32(1), np.ones(2)])
def test_a_leaf_that_would_be_lost_is_refused(leaf: Any) -> None:
    with pytest.raises(ValueError, match=r"a\.b=.* cannot be saved"):
        named_leaves({"a": {"b": leaf}})


def test_an_empty_array_and_a_strange_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w has shape \(0, 3\)"):
        named_leaves({"w": jnp.ones((0, 3))})
    with pytest.raises(ValueError, match="w has dtype complex64"):
        named_leaves({"w": jnp.ones(3, jnp.complex64)})
    with pytest.raises(ValueError, match="shape of an array"):
        stored_arrays(named_leaves(state_shape()))


def test_the_size_of_a_state_is_known_before_it_is_made() -> None:
    assert state_bytes({"w": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "key": jax.random.key(0)}) == 30 + 8
    assert state_bytes(state_shape()) == state_bytes(make_state())


def test_all_differences_are_listed_at_once() -> None:
    stored, wanted = (leaf_records(named_leaves(state)) for state in (make_state(), state_shape(width=4, ema=True)))
    with pytest.raises(CheckpointMismatchError) as mismatch:
        check_leaves(stored, wanted)
    lines = [str(d) for d in mismatch.value.differences]
    assert "params.embed: stored float32[16, 8], wanted float32[16, 4]" in lines
    assert "ema_params.bias: stored None, wanted bfloat16[4]" in lines
    assert len(lines) == 8
