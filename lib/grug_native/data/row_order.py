"""Which sequences make a batch: the order of levanter's mixtures and shuffles, asked for a batch at once.

The order is never computed here: levanter's own blocks, windows and permutations say where a sequence lies; they take
many indices at once, or are kept. A dataset is known by its exact class. If one of the datasets is of another class,
levanter reads all of them.
"""
# pyright: reportPrivateUsage=false
# levanter's blocks, windows and permutations have no public names. Its version is pinned, and tests compare the order.

from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast, final, override

import jax
import numpy as np
import tensorstore as ts
from levanter.data.dataset import AsyncDataset, BlockShufflingDataset, PermutationDataset, SlicedAsyncDataset
from levanter.data.mixture import ConcatDataset, MixtureDataset, StopStrategy
from levanter.data.text.examples import GrugLmExample
from levanter.grug.attention import AttentionMask
from levanter.utils.jax_utils import local_cpu_mesh

from grug_native.data.cache import wait_for
from grug_native.data.token_reader import Finish, Read, Rows, Sequences, token_reader
from grug_native.data.vocabulary_check import VocabCheckedDataset

type Dataset = AsyncDataset[GrugLmExample]

type Permutation = Callable[[Rows], np.ndarray]

_ENDLESS = 2**62
"""A length that no index of a sequence reaches."""


class Order(NamedTuple):
    """Where the sequences of a dataset lie."""

    sources: tuple[Read, ...]
    """What reads them."""
    find: Callable[[Rows], tuple[np.ndarray, Rows]]
    """Of each index of the dataset, the number of its source, and its row there."""


@final
class BatchReader(AsyncDataset[GrugLmExample]):
    """A dataset of sequences, read a batch at a time."""

    def __init__(self, dataset: Dataset):
        """Asks the dataset for its length and its order."""
        self.dataset = dataset
        with local_cpu_mesh():
            self.length = wait_for(dataset.async_len()) if dataset.is_finite() else None
            order = _order(dataset)
        self._read = None if order is None else _reading(order)

    def read(self, rows: Rows) -> GrugLmExample:
        """Returns the sequences at some indices; leaves of shape (N, S), on the host."""
        if self._read is None:
            with local_cpu_mesh():
                examples = wait_for(self.dataset.get_batch(rows.tolist()))
            return cast(GrugLmExample, jax.tree.map(lambda *leaves: np.stack(list(map(np.asarray, leaves))), *examples))
        futures: list[ts.Future[Any]] = []
        try:
            finish = self._read(rows, futures)
        finally:
            for future in futures:
                future.exception()  # Waits: a read that is let go of is cancelled, which can hang the process.
        tokens, loss_weight, segment_ids = finish()
        leaves = (tokens, loss_weight) if segment_ids is None else (tokens, loss_weight, segment_ids, segment_ids)
        return jax.tree.unflatten(_structure(segment_ids is not None), leaves)

    @override
    async def async_len(self) -> int:
        return await self.dataset.async_len()

    @override
    def is_finite(self) -> bool:
        return self.length is not None

    @override
    async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]:
        if self._read is None:
            return await self.dataset.get_batch(indices)
        leaves, structure = jax.tree.flatten(self.read(np.asarray(indices, np.int64)))
        return [jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True)]


@cache
def _structure(segments: bool) -> jax.tree_util.PyTreeDef:
    """How levanter's example is made of its arrays: to make its mask takes as long as to read a batch."""
    array, mask = jax.ShapeDtypeStruct((), np.int32), AttentionMask.causal()
    if segments:
        mask = mask.with_segment_ids(cast(jax.Array, array))
    return jax.tree.structure(GrugLmExample(cast(jax.Array, array), cast(jax.Array, array), mask))


def _reading(order: Order) -> Read:
    def read(rows: Rows, futures: list[ts.Future[Any]]) -> Finish:
        which, found = order.find(rows)
        places = [(source, np.flatnonzero(which == source)) for source in _distinct(which)]
        parts = [order.sources[source](found[place], futures) for source, place in places]
        return lambda: _merged([place for _, place in places], [finish() for finish in parts])

    return read


def _merged(places: Sequence[np.ndarray], parts: Sequence[Sequences]) -> Sequences:
    """Puts the sequences of each part at its places."""
    if len(parts) == 1:
        return parts[0]

    def merge(arrays: Sequence[np.ndarray]) -> np.ndarray:
        merged = np.empty((sum(map(len, places)), *arrays[0].shape[1:]), np.result_type(*arrays))
        for place, array in zip(places, arrays, strict=True):
            merged[place] = array
        return merged

    segment_ids = [part.segment_ids for part in parts if part.segment_ids is not None]
    if 0 < len(segment_ids) < len(parts):
        raise ValueError("some components know where their documents end, and some have no token that ends them")
    return Sequences(
        merge([part.tokens for part in parts]),
        merge([part.loss_weight for part in parts]),
        merge(segment_ids) if segment_ids else None,
    )


def _order(dataset: Dataset) -> Order | None:
    if type(dataset) is MixtureDataset:
        return _mixture(dataset)
    if type(dataset) is ConcatDataset:
        return _concatenated(dataset)
    if type(dataset) is PermutationDataset:
        return _permuted(dataset)
    if type(dataset) is BlockShufflingDataset:
        return _block_shuffled(dataset)
    if type(dataset) is SlicedAsyncDataset:
        return _sliced(dataset)
    source = _checked(dataset) if type(dataset) is VocabCheckedDataset else token_reader(dataset)
    return None if source is None else Order((source,), lambda rows: (np.zeros_like(rows), rows))


def _checked(dataset: VocabCheckedDataset) -> Read | None:
    if (order := _order(dataset.dataset)) is None:
        return None
    inner = _reading(order)

    def read(rows: Rows, futures: list[ts.Future[Any]]) -> Finish:
        finish = inner(rows, futures)

        def checked() -> Sequences:
            sequences = finish()
            dataset.check(rows, sequences.tokens)
            return sequences

        return checked

    return read


def _sliced(dataset: SlicedAsyncDataset[GrugLmExample]) -> Order | None:
    if (inner := _order(dataset.dataset)) is None:
        return None
    return Order(inner.sources, lambda rows: inner.find(rows + dataset.start_index))


def _permuted(dataset: PermutationDataset[GrugLmExample]) -> Order | None:
    if (inner := _order(dataset.dataset)) is None:
        return None
    permutation = wait_for(dataset._get_permutation())
    return Order(inner.sources, lambda rows: inner.find(_permute(permutation, rows)))


def _permute(permutation: Permutation | None, rows: Rows) -> Rows:
    """Applies a permutation; levanter has none for a single row."""
    return rows if permutation is None else permutation(rows).astype(np.int64)


def _block_shuffled(dataset: BlockShufflingDataset[GrugLmExample]) -> Order | None:
    if (inner := _order(dataset.dataset)) is None:
        return None
    state, block_size = wait_for(dataset._ensure_initialized()), dataset.io_block_size

    @lru_cache(maxsize=16)  # levanter keeps four, of all datasets together: a larger mixture would make them anew.
    def window(number: int) -> tuple[np.ndarray, Permutation | None, Permutation | None]:
        blocks = np.array(dataset._window_layout(number).full_blocks, np.int64)
        full, tail = dataset._window_full_region_permutation, dataset._window_tail_region_permutation
        return blocks, full(number), tail(number)

    def place(number: int, offsets: Rows) -> Rows:
        """Where a window has what comes at some offsets in it: first its whole blocks, then what is left at the end."""
        blocks, in_blocks, in_tail = window(number)
        found, whole = np.empty_like(offsets), offsets < len(blocks) * block_size
        if whole.any():
            block, offset = np.divmod(_permute(in_blocks, offsets[whole]), block_size)
            found[whole] = blocks[block] * block_size + offset
        if not whole.all():
            tail = _permute(in_tail, offsets[~whole] - len(blocks) * block_size)
            found[~whole] = state.num_full_blocks * block_size + tail
        return found

    def find(rows: Rows) -> tuple[np.ndarray, Rows]:
        windows = np.minimum(rows // state.full_window_size, state.last_window_id)
        found = np.empty_like(rows)
        for number in _distinct(windows):
            here = windows == number
            found[here] = place(number, rows[here] - number * state.full_window_size)
        return inner.find(found)

    return Order(inner.sources, find)


def _concatenated(dataset: ConcatDataset[GrugLmExample]) -> Order | None:
    if (children := _orders(dataset.datasets.values())) is None:
        return None
    ends = np.cumsum([wait_for(child.async_len()) for child in dataset.datasets.values()])
    starts = np.r_[0, ends[:-1]]

    def find(rows: Rows) -> tuple[np.ndarray, Rows]:
        which = np.searchsorted(ends, rows, side="right")
        return _found(children, which, rows - starts[which])

    return Order(_sources(children), find)


def _mixture(dataset: MixtureDataset[GrugLmExample]) -> Order | None:
    parts = [dataset.datasets[name] for name in dataset.dataset_index]
    if (children := _orders(parts)) is None:
        return None
    lengths = np.array([wait_for(part.async_len()) if part.is_finite() else _ENDLESS for part in parts])
    restarts = dataset.stop_strategy != StopStrategy.FIRST_STOP_STRATEGY

    @lru_cache(maxsize=4)
    def block(number: int) -> tuple[np.ndarray, Rows]:
        with local_cpu_mesh():
            ids = dataset._get_block(number).astype(np.int64)
        # An id is a part, and the place among the sequences that the block has of it, which begin at its first.
        firsts = [dataset._index_into_dataset_for_id(part << 16, number)[1] for part in range(len(parts))]
        which = ids >> 16
        rows = np.array(firsts)[which] + (ids & 0xFFFF)
        sources, found = _found(children, which, rows % lengths[which])
        return sources, found if restarts else np.where(rows < lengths[which], found, -1)

    def find(rows: Rows) -> tuple[np.ndarray, Rows]:
        numbers, places = np.divmod(rows, dataset.block_size)
        sources, found = np.empty_like(rows), np.empty_like(rows)
        for number in _distinct(numbers):
            here = numbers == number
            sources[here], found[here] = (table[places[here]] for table in block(number))
        if found.min() < 0:
            raise ValueError(
                "the data of a component end among these sequences, and data.stop_strategy="
                f"{dataset.stop_strategy} does not begin them anew: train fewer steps, or choose restart"
            )
        return sources, found

    return Order(_sources(children), find)


def _orders(datasets: Iterable[Dataset]) -> list[Order] | None:
    orders = [_order(dataset) for dataset in datasets]
    known = [order for order in orders if order is not None]
    return known if len(known) == len(orders) else None


def _sources(children: Sequence[Order]) -> tuple[Read, ...]:
    return tuple(source for child in children for source in child.sources)


def _found(children: Sequence[Order], which: np.ndarray, rows: Rows) -> tuple[np.ndarray, Rows]:
    """Of rows of several children, their sources, counted over all of `_sources`, and their rows there."""
    firsts = np.cumsum([0, *(len(child.sources) for child in children)])
    sources, found = np.empty_like(rows), np.empty_like(rows)
    for number in _distinct(which):
        here = which == number
        inside, found[here] = children[number].find(rows[here])
        sources[here] = inside + firsts[number]
    return sources, found


def _distinct(numbers: np.ndarray) -> list[int]:
    return sorted(set(numbers.tolist()))  # Of a batch's size, ten times as fast as `np.unique`.
