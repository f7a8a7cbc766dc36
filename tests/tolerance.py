"""How far two computations of one number may lie apart: from the dtype and the sums, never from what a processor gave.

Each rounding of a sum is off by up to half of `eps`, evenly spread, relative to the partial sum, so that n of them
wander `sqrt(n) * eps / sqrt(12)` of its size (Higham and Mary 2019, SIAM J. Sci. Comput. 41, A2815). The two sides
round independently, as the order of the terms, and fused multiply-adds, differ by processor, by mesh and by program.
Five standard deviations of the difference are `2 * eps * sqrt(n)`. The tolerance is absolute: a number that is small
because large terms cancel has the error of its terms.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from grug_native.model import GrugModelConfig

DRAW_TERMS = 9
"""Of a normal number: the polynomial in JAX's inverse error function. The random bits below it are always the same."""


def tolerance(terms: int, magnitude: ArrayLike = 1.0, dtype: str = "float32") -> float:
    """The most that two results may differ.

    Args:
        terms: additions on the longest path from the inputs to the result; 1 for a single operation.
        magnitude: size of the partial sums, of which the largest counts: that of the results, unless they cancel, or
            what amplifies an error on its way.
        dtype: the one that the sums are kept in.
    """
    return 2 * float(jnp.finfo(dtype).eps) * terms**0.5 * float(np.abs(np.asarray(magnitude)).max())


def assert_close(
    actual: ArrayLike, expected: ArrayLike, *, terms: int, magnitude: ArrayLike | None = None, dtype: str = "float32"
) -> None:
    """Equal but for the rounding of sums of so many terms; the largest number of `expected` gives their size."""
    bound = tolerance(terms, expected if magnitude is None else magnitude, dtype)
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=0, atol=bound)


def assert_trees_close(actual: object, expected: object, *, terms: int, dtype: str = "float32") -> None:
    """`assert_close` leaf by leaf, each by its own size."""
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(ours, theirs, terms=terms, dtype=dtype)


def forward_terms(config: GrugModelConfig, seq_len: int) -> int:
    """Additions on the longest path from tokens to a logit: norms, projections, scores, softmax, mean, MLP, head."""
    heads = config.num_heads * config.features_per_head
    layer = 4 * config.hidden_dim + heads + config.intermediate_dim + config.features_per_head + 2 * seq_len
    return config.num_layers * layer + 2 * config.hidden_dim


def loss_terms(config: GrugModelConfig, tokens: int, seq_len: int) -> int:
    """The same to the mean loss of so many tokens: the softmax over the vocabulary, and the mean. Steps multiply it."""
    return forward_terms(config, seq_len) + config.vocab_size + tokens


def gradient_terms(config: GrugModelConfig, tokens: int, seq_len: int) -> int:
    """The same to the gradient of a parameter: there and back, and a sum over the tokens."""
    return 2 * forward_terms(config, seq_len) + config.vocab_size + tokens
