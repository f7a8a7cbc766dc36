"""Arrays in a bucket: plain zarr3, an object a shard, written by whoever holds the shard, and read back at once.

Only numpy and TensorStore here: `sharded` is the way from devices to the blocks below.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, final

import numpy as np
import tensorstore as ts

from grug_native.bucket.errors import StoreError, explained
from grug_native.bucket.store import Store, patiently
from grug_native.checkpoint.digest import digest_text, host_digest, item_of, weigh
from grug_native.checkpoint.metadata import CheckpointError, DamagedCheckpointError, LeafRecord

_IN_FLIGHT = 8
"""Blocks that are on their way at a time."""
_LARGEST_CHUNK = 1 << 26
"""Bytes of an object at most: larger shards are cut, so that what is in flight and tried again stays bounded."""
_DIGESTED = 1 << 16
"""Elements at a time, so that they stay in the cache."""
_HANGS = 600.0
"""Seconds that one object may take."""

Sums = tuple[int, int]
"""The two sums of a digest, over a part of an array; the sums of the parts add up, modulo 2**32."""


@final
@dataclass(frozen=True)
class Layout:
    """How an array is stored."""

    record: LeafRecord
    """Its shape and type."""
    chunk: tuple[int, ...]
    """The shape of an object's part of it."""


@final
@dataclass(frozen=True)
class Block:
    """A part of an array that this process writes: a whole number of chunks."""

    leaf: str
    """The array's name."""
    start: tuple[int, ...]
    """Where it begins."""
    data: np.ndarray
    """What is in it."""


def layout(record: LeafRecord, shard: Sequence[int]) -> Layout:
    """Returns the layout of an array whose shards have the shape `shard`: an object a shard, or some if it is large."""
    pieces = -(-math.prod(shard) * np.dtype(record.dtype).itemsize // _LARGEST_CHUNK)
    cuts: list[tuple[int, int]] = []
    for axis, length in enumerate(shard):
        whole = length == record.shape[axis]  # then the last piece may be a smaller one
        count = next((n for n in range(pieces, length + 1) if whole or length % n == 0), None)
        cuts += [] if count is None else [(count, axis)]
    count, axis = min(cuts, default=(1, 0))
    chunk = list(shard)
    if count > 1:
        chunk[axis] = -(-chunk[axis] // count)
    return Layout(record, tuple(chunk))


def write_arrays(
    store: Store, prefix: str, layouts: Mapping[str, Layout], blocks: Iterable[Block], *, first: bool, patience: float
) -> dict[str, Sums]:
    """Writes blocks, and reads each back by another client as soon as it is stored.

    Args:
        store: Where to.
        prefix: What the names of the checkpoint's objects begin with.
        layouts: Of all arrays, by name.
        blocks: What this process has of them.
        first: Whether this is the process that writes zarr's metadata.
        patience: Seconds for which each object is tried again while the store is in trouble.

    Returns:
        The sums of what was read back, for each array of which this process has a block.

    Raises:
        DamagedCheckpointError: The store does not hold what it acknowledged.
        StoreError: It is in trouble.
    """
    fresh = store.reopened()
    sums: dict[str, Sums] = {}
    mutex = threading.Lock()

    def make(leaf: str) -> None:
        for at, write in ((store, True), (fresh, False)):
            patiently(
                leaf, lambda at=at, write=write: _open(at, prefix, leaf, layouts[leaf], write=write), patience=patience
            )

    def move(block: Block) -> None:
        how = layouts[block.leaf]
        part = _part(block.start, block.data.shape)
        target = _open(store, prefix, block.leaf, how, assume=True, write=True)
        source = _open(fresh, prefix, block.leaf, how, assume=True)
        patiently(block.leaf, lambda: _write(store, prefix, block, target[part]), patience=patience)
        found = patiently(block.leaf, lambda: _read(fresh, prefix, block.leaf, source[part]), patience=patience)
        one, two = block_sums(found, block.start, how.record.shape)
        with mutex:
            before = sums.get(block.leaf, (0, 0))
            sums[block.leaf] = ((before[0] + one) % 2**32, (before[1] + two) % 2**32)

    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="grug-upload") as pool:
        work = [pool.submit(make, leaf) for leaf in layouts] if first else []
        work += [pool.submit(move, piece) for block in blocks for piece in _pieces(block, layouts[block.leaf].chunk)]
        try:
            for one in work:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sums


def block_sums(block: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> Sums:
    """Returns the sums of the digest over the part of an array of `shape` that begins at `start`."""
    split = block.ndim
    while split and block.shape[split - 1] == shape[split - 1]:
        split -= 1
    first = max(split - 1, 0)  # From here on the elements of the block lie side by side in the array too.
    strides = [math.prod(shape[axis + 1 :]) for axis in range(block.ndim)]
    rows = np.full(1, sum(s * stride for s, stride in zip(start, strides, strict=True)), np.uint64)
    for axis in range(first):
        steps = np.arange(block.shape[axis], dtype=np.uint64) * np.uint64(strides[axis])
        rows = (rows[:, None] + steps).reshape(-1)
    bits = np.ascontiguousarray(block).reshape(rows.size, -1).view(f"uint{8 * block.dtype.itemsize}")
    height = max(_DIGESTED // bits.shape[1], 1)
    one = two = 0
    for top in range(0, rows.size, height):
        for left in range(0, bits.shape[1], _DIGESTED):
            words = bits[top : top + height, left : left + _DIGESTED].astype(np.uint32)
            along = np.arange(left, left + words.shape[1], dtype=np.uint64)
            first_sums, second_sums = weigh(words, (rows[top : top + height, None] + along).astype(np.uint32))
            one += int(np.sum(first_sums, dtype=np.uint32))
            two += int(np.sum(second_sums, dtype=np.uint32))
    return one % 2**32, two % 2**32


def joined(parts: Iterable[Mapping[str, Sums]]) -> dict[str, str]:
    """Returns the digests of arrays from the sums of all their parts."""
    sums: dict[str, Sums] = {}
    for part in parts:
        for leaf, (one, two) in part.items():
            before = sums.get(leaf, (0, 0))
            sums[leaf] = ((before[0] + one) % 2**32, (before[1] + two) % 2**32)
    return {leaf: digest_text(*pair) for leaf, pair in sums.items()}


@final
class BucketReader:
    """Opens the arrays of one checkpoint by name."""

    def __init__(self, store: Store, prefix: str):
        self._store, self._prefix = store.reopened(), prefix

    def open(self, leaf: str, record: LeafRecord) -> "BucketArray":
        """Opens the array stored under `leaf`.

        Raises:
            DamagedCheckpointError: It cannot be opened, or is not of the recorded shape and type.
            StoreError: The store is in trouble.
        """
        try:
            opened = self._store.array(_key(self._prefix, leaf), _zarr(record))
        except Exception as error:  # tensorstore raises bare kinds for every bad file
            raise _unreadable(self._store, f"{self._prefix}{leaf}", error) from error
        return BucketArray(self._store, f"{self._prefix}{leaf}", opened)


@final
class BucketArray:
    """An array in a bucket."""

    def __init__(self, store: Store, name: str, opened: ts.TensorStore):
        self._store, self._name, self._opened = store, name, opened

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self._opened.shape)

    def block_bytes(self, indices: Sequence[tuple[slice, ...]]) -> int:
        """Returns the size of some blocks of it."""
        sizes = (math.prod(len(range(n)[s]) for n, s in zip(self.shape, i, strict=True)) for i in indices)
        return sum(sizes) * self._opened.dtype.numpy_dtype.itemsize

    def start(self, index: tuple[slice, ...] = ()) -> "ts.Future[Any]":
        """Starts to read it, or a block of it, for `finish`."""
        return self._opened[index].read()

    def finish(self, started: "ts.Future[Any]") -> np.ndarray:
        """Waits for what `start` began.

        Raises:
            DamagedCheckpointError: The data is missing or cannot be read.
            StoreError: The store is in trouble.
        """
        try:
            return np.asarray(started.result(timeout=_HANGS))
        except Exception as error:  # as above
            raise _unreadable(self._store, self._name, error) from error


def read_verified(reader: BucketReader, leaf: str, record: LeafRecord) -> np.ndarray:
    """Reads a whole array and proves it.

    Raises:
        DamagedCheckpointError: It cannot be read, or is not what was saved.
        StoreError: The store is in trouble.
    """
    array = reader.open(leaf, record)
    read = array.finish(array.start())
    if (found := host_digest(read)) != record.digest:
        raise DamagedCheckpointError(f"{leaf} has digest {found}, and {record.digest} was saved")
    return read


def _pieces(block: Block, chunk: Sequence[int]) -> Iterable[Block]:
    """The block by single chunks."""
    counts = [range(0, length, step) for length, step in zip(block.data.shape, chunk, strict=True)]
    for offset in product(*counts):
        start = tuple(a + b for a, b in zip(block.start, offset, strict=True))
        yield Block(block.leaf, start, np.asarray(block.data[_part(offset, chunk)]))


def _part(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + length) for begin, length in zip(start, shape, strict=True))


def _key(prefix: str, leaf: str) -> str:
    return prefix + "/".join(item_of(leaf))


def _zarr(record: LeafRecord, chunk: Sequence[int] | None = None) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk or ())}}
    return {
        "shape": list(record.shape),
        "data_type": record.dtype,
        **({} if chunk is None else {"chunk_grid": grid}),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }


def _open(
    store: Store, prefix: str, leaf: str, how: Layout, *, assume: bool = False, write: bool = False
) -> ts.TensorStore:
    try:
        return store.array(_key(prefix, leaf), _zarr(how.record, how.chunk), assume=assume, write=write)
    except Exception as error:  # as above
        raise explained(store.url, "write" if write else "read", f"{prefix}{leaf}", error) from error


def _write(store: Store, prefix: str, block: Block, target: ts.TensorStore) -> None:
    try:
        target.write(block.data, can_reference_source_data_indefinitely=True).result(timeout=_HANGS)
    except Exception as error:  # as above
        raise explained(store.url, "write", f"{prefix}{block.leaf}", error) from error


def _read(store: Store, prefix: str, leaf: str, source: ts.TensorStore) -> np.ndarray:
    try:
        return np.asarray(source.read().result(timeout=_HANGS))
    except Exception as error:  # as above
        raise _unreadable(store, f"{prefix}{leaf}", error) from error


def _unreadable(store: Store, name: str, error: Exception) -> StoreError | CheckpointError:
    trouble = explained(store.url, "read", name, error)
    if isinstance(trouble, StoreError):
        return trouble
    return DamagedCheckpointError(f"{store.url}/{name} cannot be read: {error}")
