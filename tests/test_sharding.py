import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jaxtyping import Array

from grug_native.sharding import (
    AXIS_NAMES,
    MeshAxes,
    batch_sharding,
    create_mesh,
    explicit_mesh,
    out_sharding,
    reshard,
    unshard,
)
from tests.tolerance import assert_close


def test_axes_are_explicit_and_one_fills_up() -> None:
    mesh = create_mesh(8, MeshAxes(model=2), devices=jax.devices()[:4])
    assert dict(mesh.shape) == {"replica_dcn": 1, "data": 2, "expert": 1, "model": 2}
    assert mesh.axis_names == AXIS_NAMES
    assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (6, ["train_batch_size=6", "4 data-parallel", "use 4 or 8"]),
        (3, ["train_batch_size=3", "use 4"]),
        (0, ["train_batch_size=0", "use 4"]),
        ((4, 10), ["train_batch_size=10", "use 8 or 12"]),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(size: int | tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        create_mesh(size, devices=jax.devices()[:4])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("axes", [MeshAxes(data=3), MeshAxes(data=2), MeshAxes(data=-1, model=3), MeshAxes(data=8)])
def test_axes_that_do_not_fit_the_devices_are_refused(axes: MeshAxes) -> None:
    with pytest.raises(ValueError, match=r"does not fit 4 device\(s\)"):
        create_mesh(24, axes, devices=jax.devices()[:4])


@pytest.mark.parametrize("axes", [MeshAxes(data=0), MeshAxes(data=-1, model=-1), MeshAxes(data=-2)])
def test_axes_must_be_positive_and_at_most_one_open(axes: MeshAxes) -> None:
    with pytest.raises(ValueError, match="at most one of them -1"):
        axes.resolve(4)


def test_the_helpers_do_nothing_without_a_mesh() -> None:
    x = jax.numpy.ones((4, 2))
    assert reshard(x, "data", None) is x
    assert out_sharding("data", None) is None
    assert not explicit_mesh()


def test_the_helpers_lay_out_under_a_mesh() -> None:
    mesh = create_mesh(4, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert explicit_mesh()
        x = jax.device_put(jax.numpy.ones((4, 2)), batch_sharding(mesh))
        assert jax.typeof(reshard(x, None, None)).sharding.spec == jax.P(None, None)


@pytest.mark.parametrize(
    ("axes", "home", "whole"),
    [
        (MeshAxes(data=4), ("data", "model"), (None, "model")),
        (MeshAxes(data=2, model=2), ("model", "data"), (None, None)),
        (MeshAxes(replica_dcn=2, data=2), ("data", "model"), (None, "model")),
        (MeshAxes(data=1, model=4), ("data", "model"), (None, "model")),
    ],
)
def test_a_gathered_weight_is_whole_and_its_gradient_comes_home(
    axes: MeshAxes, home: tuple[str, ...], whole: tuple[str | None, ...]
) -> None:
    x, weight = jax.random.normal(jax.random.key(0), (8, 4)), jax.random.normal(jax.random.key(1), (4, 8))

    def loss(weight: Array, x: Array) -> Array:
        gathered = unshard(weight, *whole)
        assert not explicit_mesh() or jax.typeof(gathered).sharding.spec.partitions == whole
        return jnp.sum(jnp.tanh(x @ gathered))

    expected = jax.grad(loss)(weight, x)
    mesh = create_mesh(8, axes)
    with jax.set_mesh(mesh):
        placed = (reshard(weight, *home), jax.device_put(x, batch_sharding(mesh)))
        compiled = jax.jit(jax.grad(loss)).lower(*placed).compile()
        gradient = compiled(*placed)
    assert_close(gradient, expected, terms=4 + 8)
    assert jax.typeof(gradient).sharding.spec == jax.P(*home)
    text = compiled.as_text()
    assert text is not None and ("reduce-scatter(" in text) == (axes.data > 1)
