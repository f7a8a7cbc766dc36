import math
from itertools import pairwise, product

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_native.bucket import arrays as module
from grug_native.bucket.arrays import Block, BucketReader, block_sums, joined, layout, read_verified, write_arrays
from grug_native.bucket.errors import CredentialsError, UnreachableError
from grug_native.bucket.store import Store
from grug_native.checkpoint.digest import host_digest
from grug_native.checkpoint.metadata import DamagedCheckpointError, LeafRecord
from tests.bucket.proxy import Rule
from tests.bucket.servers import Bucket
from tests.bucket.toy import QUICK

DTYPES = [np.float32, np.int32, np.uint32, ml_dtypes.bfloat16, np.float16, np.int8, np.uint8, np.bool_]
PREFIX = "checkpoints/step-2.1-00000000/"
LEAF = "params.w"


def make_array(shape: tuple[int, ...], dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    values = np.asarray(np.random.default_rng(0).standard_normal(shape) * 50)
    return np.asarray(values > 0 if dtype == np.bool_ else values.astype(np.int32).astype(dtype))


def record_of(array: np.ndarray) -> LeafRecord:
    return LeafRecord(array.shape, array.dtype.name, None, host_digest(array))


def put(store: Store, array: np.ndarray, shard: tuple[int, ...], *, patience: float = 0.0) -> str:
    """Writes an array as if each shard were on a device of its own; returns the digest of what was read back."""
    starts = product(*(range(0, length, step) for length, step in zip(array.shape, shard, strict=True)))
    blocks = [
        Block(LEAF, start, np.asarray(array[tuple(slice(a, a + b) for a, b in zip(start, shard, strict=True))]))
        for start in starts
    ]
    how = {LEAF: layout(record_of(array), shard)}
    return joined([write_arrays(store, PREFIX, how, blocks, first=True, patience=patience)])[LEAF]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "shard"),
    [((), ()), ((7,), (7,)), ((8, 6, 4), (4, 6, 2)), ((8, 6, 4), (8, 3, 4)), ((4, 300, 129), (4, 150, 129))],
)
def test_arrays_come_back_and_digests_add_up(
    dtype: type, shape: tuple[int, ...], shard: tuple[int, ...], folder: str
) -> None:
    array, store = make_array(shape, dtype), Store(folder)
    assert put(store, array, shard) == host_digest(array)
    read = read_verified(BucketReader(store, PREFIX), LEAF, record_of(array))
    assert read.dtype == array.dtype and read.tobytes() == array.tobytes()
    objects = math.prod(a // b for a, b in zip(shape, shard, strict=True))
    assert len(store.list(PREFIX)) == objects + 1


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_sums_of_any_parts_add_up(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    array = make_array(shape)
    cuts = [sorted({0, *data.draw(st.lists(st.integers(0, n), max_size=2)), n}) for n in shape]
    parts = [
        {"x": block_sums(array[tuple(slice(a, b) for a, b in part)], [a for a, _ in part], shape)}
        for part in product(*(list(pairwise(c)) for c in cuts))
    ]
    assert joined(parts)["x"] == host_digest(array)


def test_large_shards_are_cut_and_small_ones_are_not() -> None:
    def chunk(shape: tuple[int, ...], shard: tuple[int, ...]) -> tuple[int, ...]:
        return layout(LeafRecord(shape, "float32", None), shard).chunk

    limit = module._LARGEST_CHUNK // 4  # pyright: ignore[reportPrivateUsage] - the shapes lie around it
    assert chunk((8, 8), (4, 8)) == (4, 8) and chunk((), ()) == ()
    assert chunk((50257, 8192), (50257, 8192)) == (2011, 8192), "a prime number of rows: the last piece is smaller"
    for shape, shard in (
        ((50257 * 8, 8192), (50257, 8192)),
        ((4096, 50257), (4096, 50257)),
        ((2, 3, limit), (1, 3, limit)),
    ):
        found = chunk(shape, shard)
        assert math.prod(found) <= limit
        assert all(s == n or s % c == 0 for n, s, c in zip(shape, shard, found, strict=True)), "pieces lie in one shard"


def test_a_piece_smaller_than_the_others_comes_back(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_CHUNK", 100)
    array, store = make_array((13, 5)), Store(folder)
    assert put(store, array, (13, 5)) == host_digest(array)
    assert np.array_equal(read_verified(BucketReader(store, PREFIX), LEAF, record_of(array)), array)
    assert len(store.list(PREFIX)) == 4


def test_what_is_missing_or_changed_is_damage_and_zeros_are_stored(folder: str) -> None:
    store, array = Store(folder), np.zeros((4, 4), np.float32)
    put(store, array, (2, 4))
    chunk = f"{PREFIX}params/w/c/1/0"
    found = store.get(chunk)
    assert found is not None and found.data == bytes(32)
    for broken, words in (
        (None, "is missing"),
        (found.data[:-1], "Not enough data"),
        (b"\1" + found.data[1:], "has digest"),
    ):
        store.delete(chunk) if broken is None else store.overwrite(chunk, broken)
        with pytest.raises(DamagedCheckpointError, match=words):
            read_verified(BucketReader(store, PREFIX), LEAF, record_of(array))
    store.overwrite(chunk, found.data)
    for broken, words in ((b"{", "Invalid JSON"), (None, "does not exist")):
        store.delete(f"{PREFIX}params/w/zarr.json")
        if broken is not None:
            store.overwrite(f"{PREFIX}params/w/zarr.json", broken)
        with pytest.raises(DamagedCheckpointError, match=words):
            BucketReader(store, PREFIX).open(LEAF, record_of(array))
    put(store, array, (2, 4))
    with pytest.raises(DamagedCheckpointError, match="Expected"):
        BucketReader(store, PREFIX).open(LEAF, LeafRecord((4, 4), "bfloat16", None))


def test_trouble_is_not_damage(bucket: Bucket) -> None:
    store, array = Store(bucket.new_folder(), retries=QUICK), make_array((4, 4))
    put(store, array, (2, 4))
    expired = b"<Error><Code>ExpiredToken</Code></Error>"
    for status, body, kind in (
        (503, b"", UnreachableError),
        (429, b"", UnreachableError),
        (500, b"", UnreachableError),
        (409, b"", UnreachableError),
        (403, b"", CredentialsError),
        (401, b"", CredentialsError),
        (400, expired, CredentialsError),
    ):
        for match in ("^GET .*zarr.json", "^GET .*/c/"):
            bucket.proxy.set_rules(Rule("answer", match, times=10_000, status=status, body=body))
            with pytest.raises(kind):
                read_verified(BucketReader(store, PREFIX), LEAF, record_of(array))
    bucket.proxy.set_rules()
    assert np.array_equal(read_verified(BucketReader(store, PREFIX), LEAF, record_of(array)), array)


def test_a_write_goes_on_where_trouble_stopped_it(bucket: Bucket) -> None:
    store, array = Store(bucket.new_folder(), retries=QUICK), make_array((8, 4))
    bucket.proxy.set_rules(
        Rule("answer", "^(PUT|POST|GET)", times=30), Rule("reset", "^(PUT|POST|GET)", after=5, times=10)
    )
    assert put(store, array, (2, 4), patience=30.0) == host_digest(array)
    bucket.proxy.set_rules(Rule("answer", "^(PUT|POST) .*/c/3", times=10_000))
    with pytest.raises(UnreachableError, match=r"write .*params.w"):
        put(Store(bucket.new_folder(), retries=QUICK), array, (2, 4))
