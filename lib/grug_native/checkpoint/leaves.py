"""A train state as named arrays and back, and what is known of each: shape, type, digest."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from grug_native.checkpoint.digest import CheckpointReader, digest_text, weigh
from grug_native.checkpoint.metadata import (
    CheckpointMismatchError,
    DamagedCheckpointError,
    LeafRecord,
    leaf_differences,
)

Leaf = jax.Array | jax.ShapeDtypeStruct
"""An array, or the promise of one: shape, type and, if it must be laid out in a certain way, sharding."""

_DIGESTED_BYTES = (1, 2, 4)


def named_leaves(tree: object) -> dict[str, Leaf]:
    """Returns the arrays of `tree`, concrete or abstract, by dotted path.

    Functions are left out: they are code. Any other leaf would silently be lost, so it is refused.

    Raises:
        ValueError: A leaf is a bare number, an empty array, or of a type whose bits cannot be digested.
    """
    leaves: dict[str, Leaf] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if callable(leaf):
            continue
        if not isinstance(leaf, Leaf):
            raise ValueError(f"{name}={leaf!r} cannot be saved: make it a jax array, or a static field")
        if leaf.size == 0:
            raise ValueError(f"{name} has shape {leaf.shape}: an empty array cannot be saved")
        if _stored_shape(leaf).dtype.itemsize not in _DIGESTED_BYTES:
            raise ValueError(f"{name} has dtype {leaf.dtype}: only types of {_DIGESTED_BYTES} bytes can be saved")
        assert name not in leaves, f"two leaves are called {name}"
        leaves[name] = leaf
    return leaves


def with_leaves[T](tree: T, leaves: Mapping[str, jax.Array]) -> T:
    """Returns `tree` with every array replaced by the one of the same name in `leaves`."""

    def pick(path: tuple[Any, ...], leaf: object) -> object:
        return leaf if callable(leaf) else leaves[jax.tree_util.keystr(path, simple=True, separator=".")]

    return jax.tree_util.tree_map_with_path(pick, tree)


def state_bytes(tree: object) -> int:
    """Returns the size of all arrays of `tree`, in bytes, over all devices."""
    return sum(stored.size * stored.dtype.itemsize for stored in map(_stored_shape, named_leaves(tree).values()))


def _is_key(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored_shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _key_impl(leaf: Leaf) -> str | None:
    if not _is_key(leaf):
        return None
    names: list[str] = []
    # The generator's name can be asked of a key only; while tracing there is one, also for an abstract leaf.
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), leaf)
    return names[0]


def leaf_records(leaves: Mapping[str, Leaf]) -> dict[str, LeafRecord]:
    """Returns shape, type and key generator of each leaf, without digest."""
    shapes = {name: _stored_shape(leaf) for name, leaf in leaves.items()}
    return {n: LeafRecord(s.shape, s.dtype.name, _key_impl(leaves[n])) for n, s in shapes.items()}


def stored_arrays(leaves: Mapping[str, Leaf]) -> dict[str, jax.Array]:
    """Returns concrete leaves with random keys unpacked to their words.

    Raises:
        ValueError: A leaf is abstract.
    """
    arrays: dict[str, jax.Array] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{name}={leaf} is the shape of an array; a state to save has arrays")
        arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return arrays


@jax.jit
def _device_digest(array: Array) -> UInt32[Array, "3"]:
    """The two sums of the digest, and the number of elements that are not finite."""
    bits = jax.lax.bitcast_convert_type(
        array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array, f"uint{8 * array.dtype.itemsize}"
    )
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        # Not arange().reshape(): an array laid out over devices cannot be reshaped freely.
        index = index + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    first, second = weigh(bits.astype(jnp.uint32), jnp.broadcast_to(index, array.shape))
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    not_finite = jnp.sum(~jnp.isfinite(array), dtype=jnp.uint32) if floating else jnp.zeros((), jnp.uint32)
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32), not_finite])


def start_digests(stored: Mapping[str, jax.Array]) -> dict[str, UInt32[Array, "3"]]:
    """Starts digesting `stored_arrays` on their devices; returns at once, `finish_digests` waits.

    One small program per distinct shape: quicker to compile and to run than one over the whole state.
    """
    return {name: _device_digest(array) for name, array in stored.items()}


def finish_digests(started: Mapping[str, UInt32[Array, "3"]]) -> tuple[dict[str, str], list[str]]:
    """Waits for digests.

    Returns:
        The digest of each leaf, and the names of the leaves with a non-finite element.
    """
    sums = {name: np.asarray(value).tolist() for name, value in started.items()}
    return {n: digest_text(a, b) for n, (a, b, _) in sums.items()}, [n for n, (_, _, bad) in sums.items() if bad]


def changed_leaves(stored: Mapping[str, LeafRecord], tree: object) -> list[str]:
    """Returns the names of the leaves that are not bit for bit the same in a checkpoint and in a concrete `tree`."""
    leaves = named_leaves(tree)
    digests, _ = finish_digests(start_digests(stored_arrays(leaves)))
    found = {name: replace(record, digest=digests[name]) for name, record in leaf_records(leaves).items()}
    return [name for name in dict.fromkeys([*stored, *found]) if stored.get(name) != found.get(name)]


def load_stored(
    reader: CheckpointReader, stored: Mapping[str, LeafRecord], wanted: Mapping[str, Leaf]
) -> dict[str, jax.Array]:
    """Loads stored arrays onto the devices that the wanted leaves ask for; `prove_leaves` has to follow.

    Args:
        reader: Of the checkpoint's files.
        stored: The checkpoint's records of at least the wanted leaves.
        wanted: Abstract leaves; one without a sharding goes to the first device.

    Raises:
        DamagedCheckpointError: An array cannot be read, or is of another type than the recorded one.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays = {name: reader.open(name, stored[name]) for name in wanted}
    return {
        name: jax.make_array_from_callback(array.shape, wanted[name].sharding or default, array.read)
        for name, array in arrays.items()
    }


def prove_leaves(loaded: Mapping[str, jax.Array], stored: Mapping[str, LeafRecord]) -> dict[str, jax.Array]:
    """Returns the leaves of loaded arrays, proven to be what was saved; several processes do this together.

    Raises:
        DamagedCheckpointError: A digest is not the recorded one; then it is so on every process.
    """
    digests, _ = finish_digests(start_digests(loaded))
    for name, digest in digests.items():
        if digest != stored[name].digest:
            raise DamagedCheckpointError(f"{name} has digest {digest}, and {stored[name].digest} was saved")
    impls = {name: stored[name].key_impl for name in loaded}
    return {n: jax.random.wrap_key_data(a, impl=impls[n]) if impls[n] else a for n, a in loaded.items()}


def check_leaves(stored: Mapping[str, LeafRecord], wanted: Mapping[str, LeafRecord]) -> None:
    """Checks that a checkpoint holds exactly the wanted leaves.

    Raises:
        CheckpointMismatchError: It does not; each leaf that is missing, left over, or of another type is listed.
    """
    found = leaf_differences(stored, wanted)
    if found:
        raise CheckpointMismatchError(
            "the checkpoint holds another model, optimizer or EMA setting than the wanted one:", found
        )
