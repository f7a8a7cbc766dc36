"""Rotary position embeddings, in the half-split convention of Hugging Face's Llama."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class GrugRopeConfig:
    """Rotary position embeddings.

    References:
        Su et al. 2021 (arXiv 2104.09864). The llama3 scaling is Hugging Face's `rope_type="llama3"`.
    """

    theta: float = 10_000.0
    """Base of the geometric progression of wavelengths."""
    llama3_factor: float | None = None
    """Stretches wavelengths beyond the original context by this factor, as Llama 3.1 does; None leaves them alone."""
    low_freq_factor: float = 1.0
    """Wavelengths above `original_max_seq_len / low_freq_factor` positions are stretched whole."""
    high_freq_factor: float = 4.0
    """Wavelengths below `original_max_seq_len / high_freq_factor` positions are left alone."""
    original_max_seq_len: int = 8192
    """Context, in positions, for which the unscaled embedding was made."""

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise ValueError(f"model.rope.theta={self.theta} must be positive")


def rotary_tables(
    rope: GrugRopeConfig, head_dim: int, positions: Int[Array, " S"]
) -> tuple[Float[Array, "S half"], Float[Array, "S half"]]:
    """Cosines and sines of the rotary angles at some positions, in f32; `half` is half a head's features."""
    half = head_dim // 2
    frequency = 1.0 / (rope.theta ** (jnp.arange(half, dtype=jnp.float32) / half))
    if rope.llama3_factor is not None:
        turns = rope.original_max_seq_len * frequency / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = (1 - smooth) * frequency / rope.llama3_factor + smooth * frequency
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(
    x: Float[Array, "B S heads E"], cos: Float[Array, "S half"], sin: Float[Array, "S half"]
) -> Float[Array, "B S heads E"]:
    """Turns each pair `(x[i], x[i + E/2])` by its position's angle (the half-split convention of Hugging Face)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
