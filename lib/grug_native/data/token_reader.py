"""What the sequences of levanter's datasets hold, read and cut for a batch at once.

levanter makes an example of each sequence, by a compiled call of its own. Here each kind of dataset has a reader that
makes the same arrays, to the byte, for all sequences of a batch and without a compiled call. `row_order` says which
sequences are asked for.
"""
# pyright: reportPrivateUsage=false
# The tables of packed documents and of shards are levanter's own, and it has no public name for them.

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple, final
from weakref import WeakSet

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from levanter.data.dataset import AsyncDataset
from levanter.data.text.datasets import (
    CausalLmDataset,
    ChatDataset,
    PackedTokenDataset,
    PrebuiltLmDataset,
    TokenSeqDataset,
)
from levanter.data.text.examples import GrugLmExample
from levanter.store.cache import TreeCache, _ShardedJaggedArrayStore
from levanter.store.jagged_array import JaggedArrayStore

from grug_native.data.cache import wait_for

type Rows = np.ndarray
"""Indices of sequences, int64, of shape (N,)."""


class Sequences(NamedTuple):
    """The arrays of N sequences, on the host; each of shape (N, S)."""

    tokens: np.ndarray
    loss_weight: np.ndarray
    segment_ids: np.ndarray | None
    """The document of each token, -1 for padding; None if attention sees across documents."""


type Finish = Callable[[], Sequences]
"""Makes the sequences out of what was read."""

type Read = Callable[[Rows, list[ts.Future[Any]]], Finish]
"""Begins to read the sequences at some rows, and adds what has to be waited for to the list."""


def token_reader(dataset: AsyncDataset[GrugLmExample]) -> Read | None:
    """Returns the reader of a dataset of sequences, or None if it is of a kind that is not known here."""
    if type(dataset) is CausalLmDataset:
        return _causal(dataset)
    if type(dataset) is PackedTokenDataset or type(dataset) is ChatDataset:
        return _packed(dataset)
    if type(dataset) is PrebuiltLmDataset:
        return _prebuilt(dataset)
    return None


def _causal(dataset: CausalLmDataset) -> Read | None:
    windows = dataset.dataset
    if type(windows) is not TokenSeqDataset or windows.loss_weights_key is not None:
        return None
    array, length = CachedArray(windows.doc_cache.jagged_array_tree()["input_ids"]), windows.seq_len

    def read(rows: Rows, futures: list[ts.Future[Any]]) -> Finish:
        tokens = array.read(rows * length, (rows + 1) * length, futures)
        return lambda: causal_sequences(
            tokens().reshape(-1, length),
            eos_id=dataset.eos_id,
            block_cross_document_attention=dataset.block_cross_document_attention,
        )

    return read


def _packed(dataset: PackedTokenDataset | ChatDataset) -> Read:
    packed, length = dataset.packed, dataset.Pos.size
    if isinstance(dataset, ChatDataset):
        weights = "assistant_masks" if dataset.mask_user_turns else None
    else:
        weights = dataset.loss_weights_key
    fields = ("input_ids",) if weights is None else ("input_ids", weights)
    arrays = {field: CachedArray(packed.dataset[field]) for field in fields}

    def read(rows: Rows, futures: list[ts.Future[Any]]) -> Finish:
        documents = [packed._pack_indices[row] for row in rows]
        pieces: dict[str, Callable[[], np.ndarray]] = {}
        sizes: dict[str, np.ndarray] = {}
        for field in fields:
            offsets = packed._offsets[field]
            starts = offsets[[pack.start for pack in documents]]
            stops = offsets[[pack.stop for pack in documents]]
            # A document that is longer than a sequence is alone in its pack, and cut.
            if packed.slice_strategy == "right":
                starts = np.maximum(starts, stops - length)
            else:
                stops = np.minimum(stops, starts + length)
            pieces[field], sizes[field] = arrays[field].read(starts, stops, futures), stops - starts

        def finish() -> Sequences:
            values = {field: _padded(pieces[field](), sizes[field], length, 0) for field in fields}
            loss_weight = None if weights is None else _canonical(values[weights])
            if isinstance(dataset, ChatDataset) and loss_weight is not None:
                loss_weight = np.roll(loss_weight, -1, axis=1).astype(np.float32)
            offsets = packed._offsets["input_ids"]
            segments = [
                np.repeat(
                    np.arange(pack.start, pack.stop, dtype=np.int32),
                    np.minimum(np.diff(offsets[pack.start : pack.stop + 1]), length),
                )
                for pack in documents
            ]
            return causal_sequences(
                values["input_ids"],
                loss_weight=loss_weight,
                segment_ids=_padded(np.concatenate(segments), sizes["input_ids"], length, -1),
                block_cross_document_attention=dataset.block_cross_document_attention,
            )

        return finish

    return read


def _prebuilt(dataset: PrebuiltLmDataset) -> Read | None:
    cache, weights = dataset.dataset, dataset.loss_weights_key
    if type(cache) is not TreeCache:
        return None
    stores = cache.jagged_array_tree()
    fields = (dataset.input_ids_key,) if weights is None else (dataset.input_ids_key, weights)
    arrays = {field: CachedArray(stores[field]) for field in fields}
    # Their first entry is the number of rows.
    offsets = {field: stores[field].offsets[1 : len(cache) + 1].read().result() for field in fields}

    def read(rows: Rows, futures: list[ts.Future[Any]]) -> Finish:
        pieces: dict[str, Callable[[], np.ndarray]] = {}
        for field in fields:
            stops = offsets[field][rows]
            starts = np.where(rows == 0, 0, offsets[field][rows - 1])
            if len(lengths := np.unique(stops - starts)) > 1:
                raise ValueError(
                    f"the prebuilt sequences of a batch must have one length, and {field} has {lengths.tolist()}"
                )
            pieces[field] = arrays[field].read(starts, stops, futures)

        def finish() -> Sequences:
            loss_weight = None
            if weights is not None:
                values = pieces[weights]().reshape(len(rows), -1)
                loss_weight = _canonical(np.stack([np.asarray(dataset.loss_weight_transform(row)) for row in values]))
            return causal_sequences(
                pieces[dataset.input_ids_key]().reshape(len(rows), -1),
                loss_weight=loss_weight,
                eos_id=dataset.eos_id,
                block_cross_document_attention=dataset.block_cross_document_attention,
            )

        return finish

    return read


def causal_sequences(
    tokens: np.ndarray,
    *,
    loss_weight: np.ndarray | None = None,
    eos_id: int | None = None,
    segment_ids: np.ndarray | None = None,
    block_cross_document_attention: bool = True,
) -> Sequences:
    """What `GrugLmExample.causal` of levanter makes of each sequence, for many at once and on the host.

    Args:
        tokens: ids of shape (N, S).
        loss_weight: of the prediction of each next token, of shape (N, S); by default 1.
        eos_id: what ends a document, if `segment_ids` do not say where they end.
        segment_ids: the document of each token, of shape (N, S), -1 for padding.
        block_cross_document_attention: whether the mask keeps documents apart.
    """
    tokens = _canonical(tokens)
    dtype = np.dtype(np.float32) if loss_weight is None else jnp.result_type(loss_weight.dtype, np.float32)
    weight = np.ones(tokens.shape, dtype) if loss_weight is None else loss_weight.astype(dtype)
    weight[:, -1] = 0  # Not a product: what XLA makes of it gives no negative zeros.
    if segment_ids is not None:
        weight[np.roll(segment_ids, -1, axis=1) < 0] = 0
    elif eos_id is not None and block_cross_document_attention:
        segment_ids = np.zeros(tokens.shape, np.int32)
        np.cumsum(tokens[:, :-1] == eos_id, axis=1, dtype=np.int32, out=segment_ids[:, 1:])
    return Sequences(tokens, weight, segment_ids if block_cross_document_attention else None)


def _canonical(values: np.ndarray) -> np.ndarray:
    """The values as a compiled function takes them: JAX has no 64 bits, unless it is told to."""
    return values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)


def _padded(values: np.ndarray, sizes: np.ndarray, length: int, padding: int) -> np.ndarray:
    """Puts pieces that lie end to end into rows of their own, of shape (N, length)."""
    rows = np.full((len(sizes), length), padding, values.dtype)
    rows[np.arange(length) < sizes[:, None]] = values
    return rows


_HELD_EACH = 2**23
_HELD = 2**26
"""Arrays of up to so many elements are held in memory, and of all together up to so many: 256 MiB of tokens.
TensorStore reads on threads of its own, for which a step on the same cores leaves no time. Of larger arrays it keeps
chunks, a gigabyte of all together.
"""


@final
class CachedArray:
    """A field of a token cache: the tokens of all its documents, say, end to end over all its shards."""

    def __init__(self, store: JaggedArrayStore | _ShardedJaggedArrayStore):
        """Takes what a cache's `jagged_array_tree` has for the field."""
        self._store = store
        self._open: dict[int, ts.TensorStore] = {}
        self._whole: np.ndarray | None = None
        if isinstance(store, JaggedArrayStore):
            self._open[0] = store.data
            self._ends = np.array([store.data_size])
        else:
            self._shards, self._ends = store._cache._ensure_shard_field_offsets(store._field)
        self._size = int(self._ends[-1])
        self._held = self._size <= _HELD_EACH and self._size + sum(array._size for array in _held) <= _HELD
        if self._held:
            _held.add(self)

    def read(self, starts: np.ndarray, stops: np.ndarray, futures: list[ts.Future[Any]]) -> Callable[[], np.ndarray]:
        """Begins to read pieces, each from a start to a stop.

        Returns:
            What gives the pieces, end to end, once the futures are done.

        Raises:
            ValueError: if a piece ends after the array, where TensorStore would read zeros.
        """
        if stops.max() > self._ends[-1]:
            raise ValueError(f"a token cache has {self._ends[-1]} elements, and {stops.max()} are wanted")
        if not self._held:
            return self._begin(starts, stops, futures)
        if (whole := self._whole) is None:
            own: list[ts.Future[Any]] = []
            values = self._begin(np.array([0]), self._ends[-1:], own)
            for future in own:
                future.exception()
            self._whole = whole = values()
        return lambda: np.concatenate([whole[start:stop] for start, stop in zip(starts, stops, strict=True)])

    def _begin(self, starts: np.ndarray, stops: np.ndarray, futures: list[ts.Future[Any]]) -> Callable[[], np.ndarray]:
        parts: list[tuple[int, int, int]] = []
        firsts = np.searchsorted(self._ends, starts, side="right")
        for shard, start, stop in zip(firsts.tolist(), starts.tolist(), stops.tolist(), strict=True):
            while start < stop:
                before, end = int(self._ends[shard - 1]) if shard else 0, min(int(self._ends[shard]), stop)
                if start < end:
                    parts.append((shard, start - before, end - before))
                start, shard = end, shard + 1
        if missing := sorted({shard for shard, _, _ in parts} - self._open.keys()):
            wait_for(self._open_shards(missing))
        with ts.Batch() as batch:
            own = [self._open[shard][start:end].read(batch=batch) for shard, start, end in parts]
        futures += own
        return lambda: np.concatenate([future.result() for future in own] or [np.zeros(0, np.int32)])

    async def _open_shards(self, shards: list[int]) -> None:
        assert not isinstance(self._store, JaggedArrayStore)
        cache, field = self._store._cache, self._store._field
        opened = await asyncio.gather(*(cache._shard_field_store_async(self._shards[n], field) for n in shards))
        self._open |= {shard: store.data for shard, store in zip(shards, opened, strict=True)}


_held = WeakSet[CachedArray]()
