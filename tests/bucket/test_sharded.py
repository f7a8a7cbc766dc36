import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grug_native.bucket.arrays import BucketReader, joined, write_arrays
from grug_native.bucket.sharded import copy_to_host, load_arrays
from grug_native.bucket.store import Store
from grug_native.checkpoint.leaves import Leaf, named_leaves, prove_leaves, stored_arrays
from grug_native.checkpoint.metadata import DamagedCheckpointError, LeafRecord
from tests.small_state import make_state

PREFIX = "checkpoints/step-2.1-00000000/"


def over(tree: object, shape: tuple[int, int], spec: PartitionSpec, *, only: int = 2) -> object:
    """The tree with its matrices laid out over a mesh, and all else on all of its devices."""
    mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])

    def place(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, spec if leaf.ndim == only else PartitionSpec()))

    return jax.tree.map(place, tree)


def store_state(state: object, folder: str) -> tuple[Store, dict[str, LeafRecord]]:
    store = Store(folder)
    host = copy_to_host(state)
    sums = write_arrays(store, PREFIX, host.layouts, host.blocks(), first=True, patience=0.0)
    records, not_finite = host.records()
    assert joined([sums]) == {n: r.digest for n, r in records.items()} and not_finite == []
    return store, records


def shapes(tree: object) -> dict[str, Leaf]:
    return {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in named_leaves(tree).items()}


@pytest.mark.parametrize(
    ("shape", "spec", "objects"),
    [
        ((1, 1), PartitionSpec(), 1),
        ((4, 1), PartitionSpec("data"), 4),
        ((2, 2), PartitionSpec("data", "model"), 4),
        ((2, 2), PartitionSpec(None, "model"), 2),
    ],
)
def test_a_state_goes_from_one_mesh_to_another(
    shape: tuple[int, int], spec: PartitionSpec, objects: int, folder: str
) -> None:
    state = over(make_state(3), shape, spec)
    store, records = store_state(state, folder)
    assert len(store.list(f"{PREFIX}params/embed/c/")) == objects
    assert len(store.list(f"{PREFIX}params/bias/c/")) == 1, "of copies, one is written"
    for other, other_spec in (
        ((1, 1), PartitionSpec()),
        ((1, 4), PartitionSpec("model")),
        ((2, 2), PartitionSpec("model", "data")),
    ):
        wanted = shapes(over(make_state(0), other, other_spec))
        loaded = prove_leaves(load_arrays(BucketReader(store, PREFIX), records, wanted), records)
        for name, array in named_leaves(state).items():
            got = loaded[name]
            assert isinstance(got, jax.Array) and got.sharding == wanted[name].sharding and got.dtype == array.dtype
            words = [np.asarray(stored_arrays({"x": one})["x"]) for one in (got, array)]
            assert words[0].tobytes() == words[1].tobytes()


def test_the_step_may_take_the_memory_of_a_state_that_was_copied() -> None:
    state = {"params": {"w": jnp.arange(1 << 16, dtype=jnp.float32)}}
    wanted = np.array(state["params"]["w"])
    host = copy_to_host(state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for _ in range(3):
        state = jax.block_until_ready(step(state))
    assert np.array_equal(next(host.blocks()).data, wanted)


def test_a_state_that_is_not_finite_is_named() -> None:
    _, not_finite = copy_to_host({"params": {"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}}).records()
    assert not_finite == ["params.w"]


def test_a_damaged_array_is_not_proven(folder: str) -> None:
    store, records = store_state(make_state(1), folder)
    key = f"{PREFIX}params/embed/c/0/0"
    found = store.get(key)
    assert found is not None
    store.overwrite(key, bytes([found.data[0] ^ 1]) + found.data[1:])
    loaded = load_arrays(BucketReader(store, PREFIX), records, shapes(make_state(0)))
    with pytest.raises(DamagedCheckpointError, match=r"params.embed has digest"):
        prove_leaves(loaded, records)
