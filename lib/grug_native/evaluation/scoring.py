"""Log-likelihoods of continuations, many requests packed into each row.

Everything here is a pure function of its arguments, the same on every process of a run.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from grug_native.attention import Mask
from grug_native.host.signals import leave_if_told_to_stop
from grug_native.language_model import LanguageModel
from grug_native.loss import ComputeDtype, score_tokens
from grug_native.sharding import batch_shards, put_batch, reshard

_PADDING_SEGMENT = -1


class Request(NamedTuple):
    """A continuation to score after a context, in token ids."""

    context: Sequence[int]
    """At least one token: something must predict the first one of the continuation."""
    continuation: Sequence[int]
    """What is scored; may be empty."""


class Score(NamedTuple):
    """What a model thinks of a continuation."""

    log_likelihood: float
    """Natural logarithm of its probability."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one where it stands."""


@dataclass(frozen=True)
class Packing:
    """Which requests share which row."""

    rows: tuple[tuple[int, ...], ...]
    """Indices of the requests of each row, from left to right."""
    tokens: int
    """Positions that hold a request."""

    def efficiency(self, row_length: int) -> float:
        """Share of the positions that hold a request."""
        return self.tokens / (len(self.rows) * row_length)


def pack(lengths: Sequence[int], row_length: int) -> Packing:
    """Packs requests into rows: the longest first, each into the row which it fills best.

    Args:
        lengths: positions of each request, at most `row_length`.
        row_length: positions of a row.

    References:
        Best-fit decreasing: Johnson et al. 1974 (doi 10.1137/0203025), at most 11/9 of the fewest rows possible.
    """
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (positions left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        found = bisect_left(space, (lengths[index], -1))
        if found == len(space):
            left, row = row_length, len(rows)
            rows.append([])
        else:
            left, row = space.pop(found)
        rows[row].append(index)
        if left > lengths[index]:
            insort(space, (left - lengths[index], row))
    return Packing(tuple(map(tuple, rows)), sum(lengths))


@final
@dataclass(frozen=True)
class Scorer:
    """Scores requests with one set of parameters. Compiles once, whatever the requests and the parameters."""

    params: LanguageModel
    """Laid out over the mesh."""
    mesh: Mesh
    """The mesh on which the parameters lie."""
    row_length: int
    """Positions of a row: the longest sequence that the model is given."""
    batch_size: int
    """Rows of a forward pass over all devices; divides over the data-parallel ones."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of the forward pass."""

    def __post_init__(self) -> None:
        shards = batch_shards(self.mesh)
        if self.batch_size % shards != 0:
            raise ValueError(
                f"eval.harness.batch_size={self.batch_size} does not divide over {shards} data-parallel devices: "
                f"use {-(-self.batch_size // shards) * shards}"
            )

    def positions(self, request: Request) -> int:
        """How many positions of a row a request takes."""
        return min(len(request.context) + len(request.continuation) - 1, self.row_length)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Scores requests, in any number and of any length. Contexts that are too long lose their beginning.

        Raises:
            ValueError: if a continuation alone is longer than a row, or a context is empty.
        """
        for request in requests:
            if not request.context or len(request.continuation) > self.row_length:
                raise ValueError(
                    f"a request of {len(request.context)} and {len(request.continuation)} tokens cannot be scored: "
                    f"there must be a context, and at most {self.row_length} tokens to score"
                )
        scores = [Score(0.0, True)] * len(requests)
        scored = [index for index, request in enumerate(requests) if request.continuation]
        rows = pack([self.positions(requests[index]) for index in scored], self.row_length).rows
        pending: tuple[list[list[int]], tuple[Array, Array]] | None = None
        for first in range(0, len(rows), self.batch_size):
            leave_if_told_to_stop()
            batch = [[scored[index] for index in row] for row in rows[first : first + self.batch_size]]
            # The devices work on this batch while the host reads the one before.
            dispatched = batch, self._dispatch(batch, requests)
            for index, score in self._read(pending, requests):
                scores[index] = score
            pending = dispatched
        for index, score in self._read(pending, requests):
            scores[index] = score
        return scores

    def _dispatch(self, rows: Sequence[Sequence[int]], requests: Sequence[Request]) -> tuple[Array, Array]:
        shape = (self.batch_size, self.row_length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        segments = np.full(shape, _PADDING_SEGMENT, np.int32)
        for row, indices in enumerate(rows):
            at = 0
            for number, index in enumerate(indices):
                ids = [*requests[index].context, *requests[index].continuation][-(self.row_length + 1) :]
                end = at + len(ids) - 1
                tokens[row, at:end], targets[row, at:end], segments[row, at:end] = ids[:-1], ids[1:], number
                at = end
        with jax.set_mesh(self.mesh):
            ids, wanted, documents = (put_batch(array, self.mesh) for array in (tokens, targets, segments))
            return _score_batch(self.params, ids, wanted, documents, self.compute_dtype)

    def _read(
        self, pending: tuple[list[list[int]], tuple[Array, Array]] | None, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Score]]:
        if pending is None:
            return
        rows, results = pending
        log_probabilities, greedy = jax.device_get(results)
        for row, indices in enumerate(rows):
            at = 0
            for index in indices:
                end = at + self.positions(requests[index])
                scored = slice(end - len(requests[index].continuation), end)
                total = float(log_probabilities[row, scored].sum(dtype=np.float64))
                yield index, Score(total, bool(greedy[row, scored].all()))
                at = end


@eqx.filter_jit
def _score_batch(
    params: LanguageModel,
    tokens: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    compute_dtype: ComputeDtype,
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Log-probability of each target and whether no token is likelier, on every device."""
    mask = Mask(segment_ids=(segments, segments))
    scores = score_tokens(params, tokens, targets, mask, compute_dtype=compute_dtype)
    return reshard(-scores.nats, None, None), reshard(scores.is_greedy, None, None)
