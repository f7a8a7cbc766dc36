from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, PRNGKeyArray

from grug_native.language_model import (
    Weight,
    abstract_parameters,
    axis_sizes,
    leaf_norms,
    parameter_axes,
    parameter_kinds,
    shard_parameters,
    weight,
    weight_at,
)
from grug_native.model import Transformer
from grug_native.sharding import MeshAxes, create_mesh
from tests.fixtures_run import SMALL_MODEL, without_runtime_types
from tests.tolerance import assert_close


class Part(eqx.Module):
    gain: Float[Array, " D"] = eqx.field(metadata=weight("norm", None))


class Toy(eqx.Module):
    table: Float[Array, "V D"] = eqx.field(metadata=weight("embedding", "model", "data"))
    parts: list[Part]
    experts: dict[str, Float[Array, "E D F"]] = eqx.field(metadata=weight("matrix", "expert", "data", None))


def toy() -> Toy:
    return Toy(jnp.ones((8, 4)), [Part(jnp.ones(4)), Part(2 * jnp.ones((3, 4)))], {"up": jnp.ones((2, 4, 4))})


def test_a_weight_says_what_it_is_where_it_stands() -> None:
    assert jax.tree.leaves(parameter_kinds(toy())) == ["embedding", "norm", "norm", "matrix"]
    found = weight_at(toy(), tuple(jax.tree_util.tree_leaves_with_path(toy())[3][0]))
    assert found == Weight("matrix", ("expert", "data", None))
    assert parameter_axes(found, 4) == (None, "expert", "data", None)
    assert axis_sizes(toy(), "data") == {4} and axis_sizes(toy(), "model") == {8}


def test_what_does_not_say_what_it_is_is_named() -> None:
    class Silent(eqx.Module):
        secret: Float[Array, " D"]

    with pytest.raises(ValueError, match=r"parameter \.secret does not say what it is: declare its field with eqx"):
        parameter_kinds(Silent(jnp.ones(3)))
    with (
        without_runtime_types(),
        pytest.raises(ValueError, match=r"weight\('bias'\) is of no known kind: choose one of embedding"),
    ):
        weight("bias")  # pyright: ignore[reportArgumentType]  # a wrong word, given on purpose


def test_weights_lie_as_their_fields_say() -> None:
    with jax.set_mesh(create_mesh(4, MeshAxes(data=1, expert=2, model=2))):
        specs = [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(jax.jit(shard_parameters)(toy()))]
    assert specs[0] == jax.P("model", "data") and specs[3] == jax.P("expert", "data", None)
    with (
        jax.set_mesh(create_mesh(4, MeshAxes(expert=4))),
        pytest.raises(ValueError, match=r"experts\['up'\]\.shape\[0\]=2 does not divide over the 4 .* 'expert'"),
    ):
        shard_parameters(toy())


@pytest.mark.parametrize(
    ("axes", "field"),
    [(MeshAxes(model=4), "num_kv_heads=2"), (MeshAxes(data=3, model=1), "hidden_dim=32")],
)
def test_a_model_that_does_not_divide_over_the_mesh_is_refused(axes: MeshAxes, field: str) -> None:
    devices = jax.devices()[: 3 if axes.data == 3 else 4]
    with (
        jax.set_mesh(create_mesh(12, axes, devices=devices)),
        pytest.raises(ValueError, match=rf"model\.{field} does not divide over the \d devices of the mesh axis"),
    ):
        abstract_parameters(SMALL_MODEL)


def test_norms_of_layers_are_apart() -> None:
    norms = leaf_norms(toy())
    assert list(norms) == ["table", "parts.0.gain", "parts.1.gain", "experts.up"]
    assert [norm.shape for norm in norms.values()] == [(), (), (3,), ()]
    assert_close(norms["parts.1.gain"], jnp.full(3, 4.0), terms=4)


def test_an_abstract_model_takes_no_memory() -> None:
    @dataclass(frozen=True)
    class Counting:
        vocab_size: int = 300
        max_seq_len: int = 32

        def init(self, *, key: PRNGKeyArray) -> Transformer:
            return replace(SMALL_MODEL, num_layers=1).init(key=key)

    leaves = jax.tree.leaves(abstract_parameters(Counting()))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
