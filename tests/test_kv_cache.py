from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from grug_native.attention import Mask
from grug_native.language_model import LanguageModel
from grug_native.language_model import logits as logits_of
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import assert_close, forward_terms

TERMS = forward_terms(SMALL_MODEL, 32)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Weights large enough that the logits differ by more than rounding."""
    return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, SMALL_MODEL.init(key=jax.random.key(1)))


logits = eqx.filter_jit(logits_of)


@eqx.filter_jit
def read(model: LanguageModel, tokens: Array, mask: Mask, cache: object) -> tuple[Array, object]:
    hidden, _, cache = model.hidden(tokens, mask, cache=cache)
    return model.unembed(hidden), cache


def in_pieces(model: LanguageModel, tokens: Array, mask: Mask, pieces: list[int]) -> Array:
    cache, start, found = model.init_cache(tokens.shape[0], 40, "float32"), 0, list[Array]()
    for piece in pieces:
        own = slice(start, start + piece)
        ids = None if mask.segment_ids is None else (mask.segment_ids[0][:, own],) * 2
        one, cache = read(model, tokens[:, own], replace(mask, segment_ids=ids), cache)
        found.append(one)
        start += piece
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("pieces", [[32], [5] + [1] * 27, [8, 3, 21]])
@pytest.mark.parametrize("mask", [Mask(), Mask(sliding_window=6)])
def test_logits_equal_those_of_the_full_forward_pass(model: LanguageModel, pieces: list[int], mask: Mask) -> None:
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 300)
    assert_close(in_pieces(model, tokens, mask, pieces), logits(model, tokens, mask), terms=TERMS)


def test_padding_before_a_text_changes_nothing(model: LanguageModel) -> None:
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 300)
    padding = jnp.array([5, 0])
    ids = jnp.where(jnp.arange(32)[None] < padding[:, None], -1, 0)
    found = in_pieces(model, tokens, Mask(segment_ids=(ids, ids)), [9, 1, 22])
    assert_close(found[0, 5:], logits(model, tokens[:1, 5:], Mask())[0], terms=TERMS)
    assert_close(found[1], logits(model, tokens[1:], Mask())[0], terms=TERMS)
