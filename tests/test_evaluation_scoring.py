from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jaxtyping import Array
from levanter.data.packing import pack_documents
from levanter.grug.attention import AttentionMask

from grug_native import loss
from grug_native.evaluation.drawing import Sampling
from grug_native.evaluation.generate import Prompt, Sampler
from grug_native.evaluation.scoring import Request, Score, Scorer, pack
from grug_native.language_model import logits
from grug_native.model import Transformer
from grug_native.sharding import MeshAxes, create_mesh
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import forward_terms, tolerance

ROW = 64
MODEL = replace(SMALL_MODEL, max_seq_len=ROW, initializer_std=0.3)
VOCAB = MODEL.vocab_size
# Of the log-likelihood of a row's tokens, each of some ten nats with an error of its own.
TOLERANCE = tolerance(forward_terms(MODEL, ROW) + VOCAB + ROW, 10 * ROW**0.5)


def _scorer(batch_size: int, axes: MeshAxes = MeshAxes()) -> Scorer:
    mesh = create_mesh(batch_size, axes)
    with jax.set_mesh(mesh):
        return Scorer(Transformer.init(MODEL, key=jax.random.key(0)), mesh, ROW, batch_size)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return _scorer(8)


def _requests(number: int) -> list[Request]:
    """Mixed lengths: contexts and continuations of one token, no continuation, and contexts far longer than a row."""
    rng = np.random.default_rng(0)

    def ids(lengths: Sequence[int]) -> list[int]:
        return rng.integers(0, VOCAB, rng.choice(lengths)).tolist()

    contexts, continuations = [1, 1, 2, 5, 20, 60, 64, 100, 200], [0, 1, 1, 2, 5, 10, 40, 64]
    return [Request(ids(contexts), ids(continuations)) for _ in range(number)]


@jax.jit
def _logits(params: Transformer, tokens: Array) -> Array:
    return logits(params, tokens, AttentionMask.causal())


def _log_probabilities(params: Transformer, mesh: Mesh, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-probabilities of every next token, one sequence a row."""
    tokens = np.zeros((100, ROW), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    with jax.set_mesh(mesh):
        logits = np.asarray(_logits(params, jnp.asarray(tokens)), np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _one_by_one(params: Transformer, mesh: Mesh, requests: Sequence[Request]) -> list[Score]:
    """What lm-eval's own `HFLM` computes, by its definition."""
    scores: list[Score] = []
    for first in range(0, len(requests), 100):
        some = requests[first : first + 100]
        sequences = [[*context, *own][-(ROW + 1) :] for context, own in some]
        table = _log_probabilities(params, mesh, [ids[:-1] for ids in sequences])
        for row, (ids, request) in enumerate(zip(sequences, some, strict=True)):
            own = list(request.continuation)
            predicted = table[row, len(ids) - 1 - len(own) : len(ids) - 1]
            total = float(predicted[np.arange(len(own)), own].sum())
            scores.append(Score(total, bool((predicted.argmax(axis=-1) == own).all())))
    return scores


def test_packed_scores_equal_one_request_at_a_time(scorer: Scorer) -> None:
    requests = _requests(1000)
    # Some continuations are what the model itself would say, so that both greedy flags occur.
    prompts = [request.context[:20] for request in requests[::20]]
    sampler = Sampler(scorer.params, scorer.mesh, 64)
    greedy = sampler.draw([Prompt(prompt, 3, Sampling(temperature=0.0)) for prompt in prompts])
    requests[::20] = [Request(prompt, ids) for prompt, ids in zip(prompts, greedy, strict=True)]
    one_device = create_mesh(4, devices=jax.devices()[:1])
    alone = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), scorer.params)
    expected = _one_by_one(alone, one_device, requests)
    found = scorer.score(requests)
    assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    assert 50 <= sum(score.is_greedy for score in found) < 500  # some 125 have nothing to score
    np.testing.assert_allclose(
        [score.log_likelihood for score in found],
        [score.log_likelihood for score in expected],
        rtol=0,
        atol=TOLERANCE,
    )


def test_scores_do_not_depend_on_how_they_are_computed(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _requests(60)
    reference = scorer.score(requests)
    # The logits of 16 positions at a time, on a mesh with tensor parallelism.
    monkeypatch.setattr(loss, "FULL_LOGITS_BYTES", 0)
    monkeypatch.setattr(loss, "BLOCK_TOKENS", 16)
    cut = _scorer(4, MeshAxes(data=2, model=2))
    other = replace(cut, params=replace(cut.params, config=replace(MODEL, attention="reference"))).score(requests)
    wanted = pytest.approx([score.log_likelihood for score in reference], abs=TOLERANCE)
    assert [score.log_likelihood for score in other] == wanted
    assert [score.is_greedy for score in other] == [score.is_greedy for score in reference]
    again = scorer.score(list(reversed(requests)))
    assert [score.log_likelihood for score in reversed(again)] == wanted


def test_what_cannot_be_scored_is_named(scorer: Scorer) -> None:
    assert scorer.score([]) == []
    assert scorer.score([Request([1], [])]) == [Score(0.0, True)]
    for request in (Request([], [1]), Request([1], [1] * (ROW + 1))):
        with pytest.raises(ValueError, match="at most 64 tokens"):
            scorer.score([request])
    with pytest.raises(ValueError, match=r"batch_size=6 does not divide over 4 .*use 8"):
        replace(scorer, batch_size=6)


@given(lengths=st.lists(st.integers(1, ROW), max_size=200))
def test_packing_places_each_request_once_and_wastes_little(lengths: list[int]) -> None:
    packing = pack(lengths, ROW)
    assert sorted(index for row in packing.rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= ROW for row in packing.rows)
    assert packing.tokens == sum(lengths)
    # A row is opened only when no other has the space, so two of them cannot both be half empty.
    assert sum(sum(lengths[index] for index in row) <= ROW // 2 for row in packing.rows) <= 1


def test_packing_reaches_its_bar_and_levanters_does_not() -> None:
    lengths = np.random.default_rng(1).lognormal(4.6, 0.9, 2000).astype(int).clip(2, 1024)
    ours = pack(lengths.tolist(), 1024)
    theirs = pack_documents(lengths, 1024)
    assert ours.efficiency(1024) >= 0.98
    assert lengths.sum() / (1024 * len(theirs)) < ours.efficiency(1024)
