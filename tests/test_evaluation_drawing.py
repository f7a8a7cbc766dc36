import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_native.evaluation.drawing import Sampling, draw, in_nucleus, rule_of

VOCAB = 8
LOGITS = jnp.array([2.0, 0.5, -1.0, 1.0, 0.0, -3.0, 1.5, -0.5])


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=VOCAB, max_size=VOCAB, unique=True),
    top_p=st.integers(1, 64).map(lambda number: number / 64),
)
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_it(logits: list[int], top_p: float) -> None:
    row = np.array(logits, np.float32) / 10
    kept = np.isfinite(np.asarray(in_nucleus(jnp.asarray(row)[None], jnp.asarray(top_p, jnp.float32)))[0])
    probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    assert kept.any() and probabilities[kept].min() > probabilities[~kept].max(initial=0.0)
    rounding = VOCAB * np.finfo(np.float32).eps
    assert probabilities[kept].sum() >= top_p - rounding
    assert probabilities[kept].sum() - probabilities[kept].min() < top_p + rounding


@pytest.mark.parametrize(
    ("sampling", "among"),
    [
        (Sampling(temperature=0.7), 8),
        (Sampling(temperature=0.7, top_k=3), 3),
        (Sampling(temperature=0.7, top_p=0.75), 2),
        # Of three, the likeliest has 0.51 and the next 0.31.
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), 2),
        (Sampling(temperature=1.0, top_p=1e-6), 1),
        (Sampling(temperature=0.0, top_k=3, top_p=0.5), 1),
    ],
)
def test_draws_are_distributed_as_the_softmax_says(sampling: Sampling, among: int) -> None:
    number = 4000
    seeds, positions = jnp.arange(number, dtype=jnp.uint32), jnp.full(number, 5)
    rule, knobs = rule_of(sampling), (jnp.float32(sampling.temperature), jnp.float32(sampling.top_p or 1.0))
    drawn = np.asarray(draw(jnp.tile(LOGITS, (number, 1)), seeds, positions, rule, *knobs))
    likeliest = np.argsort(-np.asarray(LOGITS))[:among]
    weights = np.exp(np.asarray(LOGITS)[likeliest] / (sampling.temperature or 1.0))
    wanted = weights / weights.sum()
    found = np.array([(drawn == token).mean() for token in likeliest])
    assert set(drawn.tolist()) <= set(likeliest.tolist())
    assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / number)).all()  # four standard deviations


def test_a_draw_depends_on_its_own_logits_seed_and_position() -> None:
    rows = jax.random.normal(jax.random.key(0), (6, 50))
    seeds, positions = jnp.array([3, 1, 4, 1, 5, 9], jnp.uint32), jnp.array([2, 7, 1, 7, 2, 8])
    rule, knobs = rule_of(Sampling(top_k=20, top_p=0.9)), (jnp.float32(1.0), jnp.float32(0.9))
    together = draw(rows, seeds, positions, rule, *knobs).tolist()
    apart = [draw(rows[n][None], seeds[n][None], positions[n][None], rule, *knobs).item() for n in range(6)]
    assert together == apart
    assert together != draw(rows, seeds + 1, positions, rule, *knobs).tolist()
    assert together != draw(rows, seeds, positions + 1, rule, *knobs).tolist()
