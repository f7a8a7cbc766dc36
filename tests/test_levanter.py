"""What this project builds on must still be so in the levanter that is pinned."""

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis
from levanter.data.text.datasets import LmDataConfig, NamedLmDataset
from levanter.data.text.examples import (
    GrugLmExample,
    grug_lm_example_from_named,
    named_lm_example_from_grug,
)
from levanter.layers.attention import AttentionMask
from levanter.models.lm_model import LmExample
from levanter.schedule import BatchSchedule
from levanter.utils.thread_utils import blocking_wait

POS = Axis("position", 16)
EOS = 7
TOKENS = jnp.array([3, 4, EOS, 5, 6, 8, EOS, 9, 1, 2, 3, 4, 5, 6, 8, 9], jnp.int32)


def test_unnamed_lm_example_parity_with_named() -> None:
    plain = GrugLmExample.causal(TOKENS, eos_id=EOS)
    named = LmExample.causal(hax.named(TOKENS, POS), eos_id=EOS)
    np.testing.assert_array_equal(plain.tokens, named.tokens.array)
    np.testing.assert_array_equal(plain.loss_weight, named.loss_weight.array)
    ours = plain.attn_mask.materialize_mask(16, 16)
    assert isinstance(named.attn_mask, AttentionMask)
    theirs = named.attn_mask.materialize(POS, POS.alias("key_position"))
    assert ours is not None and theirs is not None
    np.testing.assert_array_equal(ours, theirs.array)


def test_named_unnamed_lm_example_roundtrip() -> None:
    plain = GrugLmExample.causal(TOKENS, eos_id=EOS, sliding_window=4)
    again = grug_lm_example_from_named(named_lm_example_from_grug(plain, POS))
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (again.attn_mask.is_causal, again.attn_mask.sliding_window) == (True, 4)


def test_train_set_last_mile_wraps_to_named(small_corpus: LmDataConfig) -> None:
    key, schedule = jax.random.PRNGKey(0), BatchSchedule(4)
    plain = small_corpus.train_mixture(POS, schedule, key=key)
    named = small_corpus.train_set(POS, schedule, key=key)
    assert isinstance(named, NamedLmDataset)
    for index in (0, 5, 17):
        unnamed, wrapped = blocking_wait(plain.getitem_async(index)), blocking_wait(named.getitem_async(index))
        assert isinstance(unnamed, GrugLmExample) and isinstance(wrapped, LmExample)
        np.testing.assert_array_equal(unnamed.tokens, wrapped.tokens.array)
        np.testing.assert_array_equal(unnamed.loss_weight, wrapped.loss_weight.array)
