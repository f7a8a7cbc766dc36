"""How the next token of a text is drawn from the model's logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from grug_native.types import Scalar


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which tokens are drawn, and how likely."""

    temperature: float = 1.0
    """Divides the logits, a number of at least 0; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among so many likeliest tokens; None draws among all."""
    top_p: float | None = None
    """Of those, draw among the fewest likeliest tokens which have this probability together; None draws among all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be a number of at least 0; 0 takes the likeliest token"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be null or lie in (0, 1]")

    def check_vocabulary(self, size: int) -> None:
        """Refuses a `top_k` that is more or less than there are tokens: a `ValueError` names both."""
        if self.top_k is not None and not 1 <= self.top_k <= size:
            raise ValueError(f"top_k={self.top_k} must be null or lie in [1, {size}]")


@dataclass(frozen=True)
class Rule:
    """What of a `Sampling` is compiled."""

    greedy: bool
    """Take the likeliest token."""
    top_k: int | None
    """As in `Sampling`."""
    nucleus: bool
    """Whether there is a `top_p`."""


def rule_of(sampling: Sampling) -> Rule:
    """The part of it for which a program is compiled."""
    greedy = sampling.temperature == 0
    return Rule(greedy, None if greedy else sampling.top_k, not greedy and (sampling.top_p or 1.0) < 1)


def draw(
    logits: Float[Array, "B V"],
    seeds: UInt[Array, " B"],
    positions: Int[Array, " B"],
    rule: Rule,
    temperature: Scalar,
    top_p: Scalar,
) -> Int[Array, " B"]:
    """Draws a token of each text: a function of its logits, its seed and its position, and of no other text.

    Args:
        logits: unnormalised log-probabilities.
        seeds: of the texts.
        positions: of the tokens in their texts.
        rule: what is done.
        temperature: as in `Sampling`, where it is not 0.
        top_p: as in `Sampling`, where there is one.
    """
    if rule.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if rule.top_k is not None:
        logits = jnp.where(logits < jax.lax.top_k(logits, rule.top_k)[0][:, -1:], -jnp.inf, logits)
    logits = logits / temperature
    if rule.nucleus:
        logits = in_nucleus(logits, top_p)

    def draw_one(seed: UInt[Array, ""], position: Int[Array, ""], logits: Float[Array, " V"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits)

    return jax.vmap(draw_one)(seeds, positions, logits).astype(jnp.int32)


def in_nucleus(logits: Float[Array, "B V"], top_p: Scalar) -> Float[Array, "B V"]:
    """Hides all but the fewest likeliest tokens whose probabilities add up to `top_p`; there is always one.

    References:
        Holtzman et al. 2020 (arXiv 1904.09751).
    """
    probabilities = jax.nn.softmax(logits)
    falling = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)
