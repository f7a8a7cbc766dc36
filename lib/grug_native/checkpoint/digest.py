"""Digests of arrays, and proof from the files alone that a checkpoint holds what was saved.

Orbax does not checksum array data: most single-bit flips in its files load silently. So every array is digested on the
device when it is saved, and again from what was read. The digest is a sum over elements, of the element's bits times a
weight that depends on its index, modulo 2**32. Integer sums may be taken in any order, so the value does not depend on
how the array is laid out over devices; and as bits are mixed by a bijection and weights are odd, a change of any one
element always changes it. Two sums with different weights make 64 bits.

Only numpy here, and tensorstore once a file is opened: a checkpoint can be read and verified with no config and no
device.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointMetadata,
    DamagedCheckpointError,
    LeafRecord,
    read_metadata,
)

_CHUNK = 1 << 16
_WEIGHTS = ((np.uint32(0x9E3779B1), np.uint32(15)), (np.uint32(0x85EBCA77), np.uint32(13)))
_ONE, _FOLD = np.uint32(1), np.uint32(15)

_NOT_DAMAGE = re.compile(
    r"^(PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): "
    # An answer of a store other than "there is no such object" is none about the data: an expired token is a 400.
    r"|\[http_response_code='(?!404)|\[curl_code="
)
"""What TensorStore says when the trouble is here and now, and not in the files."""

ITEMS = ("params", "ema_params")
"""Parts of the state that are stored each in an item of its own, so that they can be loaded alone."""


def weigh[Words](bits: Words, index: Words) -> tuple[Words, Words]:
    """Returns the two summands of each element; the one formula for numpy and for JAX.

    Args:
        bits: The elements' bits as uint32, any shape.
        index: The elements' row-major positions in the whole array, modulo 2**32, same shape.
    """
    words: Any = bits
    positions: Any = index
    mixed = words ^ (words >> _FOLD)
    first, second = (((scaled := positions * factor) ^ (scaled >> shift)) | _ONE for factor, shift in _WEIGHTS)
    return mixed * first, mixed * second


def digest_text(first: int, second: int) -> str:
    """Returns the two sums as 16 hexadecimal digits."""
    return f"{first:08x}{second:08x}"


def host_digest(array: np.ndarray) -> str:
    """Returns the digest of an array of 1, 2 or 4 bytes an element, chunk by chunk so that it stays in cache."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    first = second = 0
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + chunk.size, dtype=np.uint64).astype(np.uint32)
        one, two = weigh(chunk, index)
        first += int(np.sum(one, dtype=np.uint32))
        second += int(np.sum(two, dtype=np.uint32))
    return digest_text(first % 2**32, second % 2**32)


def item_of(leaf: str) -> tuple[str, str]:
    """Returns the item a leaf of the state is stored in, and its name there: `params.embed` is `embed` in `params`."""
    head, _, rest = leaf.partition(".")
    return (head, rest) if head in ITEMS else ("train", leaf)


class CheckpointReader:
    """Opens the arrays of one checkpoint by name, straight from its OCDBT and Zarr files."""

    def __init__(self, path: Path):
        import tensorstore

        self._path = path
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})

    def open(self, leaf: str, record: LeafRecord) -> "StoredArray":
        """Opens the array stored under `leaf`.

        Raises:
            DamagedCheckpointError: It cannot be opened, or is not of the recorded shape and type.
            CheckpointError: It cannot be opened here and now, for want of a permission or of memory.
        """
        import tensorstore

        item, name = item_of(leaf)
        store = {"driver": "ocdbt", "base": f"file://{self._path.resolve()}/{item}/", "path": f"{name}/"}
        spec = {"driver": "zarr3", "kvstore": store}
        try:
            opened = tensorstore.open(spec, open=True, read=True, context=self._context).result()
        except Exception as error:  # tensorstore raises bare ValueError and Exception for every kind of bad file
            raise _unreadable(f"{self._path}: {leaf} cannot be opened", error) from error
        array = StoredArray(self._path, leaf, opened)
        if (array.shape, array.dtype.name) != (record.shape, record.dtype):
            raise DamagedCheckpointError(
                f"{self._path}: {leaf} is {array.dtype.name}{list(array.shape)} on disk, and {record} was saved"
            )
        return array


class StoredArray:
    """An array in a checkpoint's files."""

    def __init__(self, path: Path, leaf: str, store: Any):
        self._path, self._leaf, self._store = path, leaf, store

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self._store.shape)

    @property
    def dtype(self) -> np.dtype:
        """Its type, with JAX's extension types."""
        return self._store.dtype.numpy_dtype

    def read(self, index: tuple[slice, ...] | None = ()) -> np.ndarray:
        """Reads it, or a block of it; None stands for all of it, as in `jax.make_array_from_callback`.

        Raises:
            DamagedCheckpointError: The data cannot be read.
            CheckpointError: They cannot be read here and now, for want of a permission or of memory.
        """
        try:
            return np.asarray(self._store[index or ()].read().result())
        except Exception as error:  # as above
            raise _unreadable(f"{self._path}: {self._leaf} cannot be read", error) from error


def is_trouble(error: Exception) -> bool:
    """Whether an error of TensorStore's is about the network, credentials or memory, and says nothing of the data."""
    return isinstance(error, MemoryError | TimeoutError) or _NOT_DAMAGE.search(str(error)) is not None


def _unreadable(what: str, error: Exception) -> CheckpointError:
    return (CheckpointError if is_trouble(error) else DamagedCheckpointError)(f"{what}: {error}")


def read_leaves(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of a checkpoint with no config at hand, and verifies them.

    Args:
        path: A committed `step-N` folder.
        names: Which leaves; all of them by default.

    Returns:
        The arrays by their dotted path in the train state, such as `params.embed`; a random key is its uint32 words.

    Raises:
        DamagedCheckpointError: A leaf cannot be read or is not what was saved.
    """
    metadata = read_metadata(path)
    reader = CheckpointReader(path)
    return {name: _read_verified(reader, name, metadata) for name in (metadata.leaves if names is None else names)}


def _read_verified(reader: CheckpointReader, name: str, metadata: CheckpointMetadata) -> np.ndarray:
    record = metadata.leaves[name]
    array = reader.open(name, record).read()
    found, wanted = host_digest(array), record.digest
    if found != wanted:
        raise DamagedCheckpointError(f"step {metadata.step}: {name} has digest {found}, and {wanted} was saved")
    return array


def verify_files(path: Path, metadata: CheckpointMetadata) -> list[str]:
    """Reads every array in the files under `path` and compares it with the digest taken when it was saved.

    One array is in memory at a time.

    Returns:
        What is wrong, a sentence a leaf; empty if all is well.
    """
    reader = CheckpointReader(path)
    problems: list[str] = []
    for name in metadata.leaves:
        try:
            _read_verified(reader, name, metadata)
        except DamagedCheckpointError as error:
            problems.append(str(error))
    return problems
