"""A train state on devices as blocks in the host's memory, and back from a bucket onto any mesh."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import jax
import numpy as np
import tensorstore as ts

from grug_native.bucket.arrays import Block, BucketArray, BucketReader, Layout, layout
from grug_native.checkpoint.leaves import (
    Leaf,
    finish_digests,
    leaf_records,
    named_leaves,
    start_digests,
    stored_arrays,
)
from grug_native.checkpoint.metadata import LeafRecord

_IN_FLIGHT_BYTES = 1 << 28
"""So much is read ahead of what goes to the devices."""

Index = tuple[slice, ...]


@final
@dataclass(frozen=True)
class HostState:
    """A state's arrays as this process holds them, in memory that nobody else writes to."""

    layouts: Mapping[str, Layout]
    """Of all arrays, by dotted path in the state."""
    _shards: tuple[tuple[str, tuple[int, ...], np.ndarray], ...]
    _digests: Mapping[str, jax.Array]

    def blocks(self) -> Iterator[Block]:
        """Waits for the shards that this process writes; every shard is written by one process."""
        return (Block(name, start, data) for name, start, data in self._shards)

    def records(self) -> tuple[dict[str, LeafRecord], list[str]]:
        """Waits for the digests that the devices compute.

        Returns:
            The arrays as they are to be recorded, and the names of those with an element that is not finite.
        """
        texts, not_finite = finish_digests(self._digests)
        return {n: replace(how.record, digest=texts[n]) for n, how in self.layouts.items()}, not_finite


def copy_to_host(state: object) -> HostState:
    """Takes hold of what this process has to write of `state`, which the caller may donate afterwards.

    An accelerator's arrays are copied here. A CPU's are read where they are: JAX gives a step that is given such an
    array other memory to write to, as it does while Orbax writes to a disk.

    Raises:
        ValueError: A leaf of the state cannot be stored.
    """
    leaves = named_leaves(state)
    arrays = stored_arrays(leaves)
    digests = start_digests(arrays)
    shards = [(n, s) for n, array in arrays.items() for s in array.addressable_shards if s.replica_id == 0]
    for _, shard in shards:
        shard.data.copy_to_host_async()
    held = tuple((n, tuple(part.start or 0 for part in s.index), np.asarray(s.data)) for n, s in shards)
    records = leaf_records(leaves)
    layouts = {n: layout(records[n], array.sharding.shard_shape(array.shape)) for n, array in arrays.items()}
    return HostState(layouts, held, digests)


def load_arrays(
    reader: BucketReader, stored: Mapping[str, LeafRecord], wanted: Mapping[str, Leaf]
) -> dict[str, jax.Array]:
    """Loads stored arrays onto the devices that the wanted leaves ask for; `prove_leaves` has to follow.

    Args:
        reader: Of the checkpoint.
        stored: The checkpoint's records of at least the wanted leaves.
        wanted: Abstract leaves; one without a sharding goes to the first device.

    Raises:
        DamagedCheckpointError: An array cannot be read, or is of another shape or type than the recorded one.
        StoreError: The store is in trouble.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays = {name: reader.open(name, stored[name]) for name in wanted}
    shardings = {name: leaf.sharding or default for name, leaf in wanted.items()}
    loaded: dict[str, jax.Array] = {}
    for name, parts in _read_ahead(arrays, shardings):
        found = {_hashable(index): array for index, array in parts}
        loaded[name] = jax.make_array_from_callback(
            arrays[name].shape, shardings[name], lambda index, found=found: found[_hashable(index or ())]
        )
    return loaded


def _read_ahead(
    arrays: Mapping[str, BucketArray], shardings: Mapping[str, jax.sharding.Sharding]
) -> Iterator[tuple[str, list[tuple[Index, np.ndarray]]]]:
    """What this process's devices need of each array, in order, while the next ones are on their way."""
    waiting: deque[tuple[str, list[tuple[Index, ts.Future[Any]]], int]] = deque()
    ahead = 0
    for name, array in arrays.items():
        needed = {
            _hashable(i): i
            for i in shardings[name].addressable_devices_indices_map(array.shape).values()
            if i is not None
        }
        started = [(index, array.start(index)) for index in needed.values()]
        size = array.block_bytes(list(needed.values()))
        waiting.append((name, started, size))
        ahead += size
        while waiting and ahead > _IN_FLIGHT_BYTES:
            ahead -= waiting[0][2]
            yield _finished(arrays, *waiting.popleft()[:2])
    while waiting:
        yield _finished(arrays, *waiting.popleft()[:2])


def _finished(
    arrays: Mapping[str, BucketArray], name: str, started: "list[tuple[Index, ts.Future[Any]]]"
) -> tuple[str, list[tuple[Index, np.ndarray]]]:
    return name, [(index, arrays[name].finish(future)) for index, future in started]


def _hashable(index: Index) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)
