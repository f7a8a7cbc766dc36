"""Keys and values of the positions read so far, for models that attend to them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from grug_native.attention import attend, visible
from grug_native.types import AttentionMask

type LayerCache = tuple[Float[Array, "B K N E"], Float[Array, "B K N E"]]
"""Keys and values of one layer."""

_UNREAD = -2
"""Segment of what stands behind the positions read so far."""


class KeyValueCache(eqx.Module):
    """Keys and values of all layers, at the positions read so far."""

    layers: PyTree[Float[Array, "L B K N E"]]
    """Rotated keys, and values; or several such pairs, of layers that are not all alike."""
    segment_ids: Int[Array, "B K"]
    """Of the positions read; texts of several lengths begin with padding, which has a segment of its own."""
    length: Int[Array, ""]
    """Positions read."""

    @staticmethod
    def empty(layers: int, batch: int, length: int, heads: int, features: int, dtype: str) -> "KeyValueCache":
        """A cache with room for `length` positions."""
        numbers = jnp.zeros((layers, batch, length, heads, features), dtype)
        segment_ids = jnp.full((batch, length), _UNREAD, jnp.int32)
        return KeyValueCache((numbers, numbers), segment_ids, jnp.zeros((), jnp.int32))

    def read(self, tokens: Int[Array, "B S"], mask: AttentionMask) -> "Reading":
        """What the layers have to know to read `tokens` after what the cache holds."""
        own = jnp.zeros_like(tokens) if mask.segment_ids is None else mask.segment_ids[0]
        segment_ids = jax.lax.dynamic_update_slice_in_dim(self.segment_ids, own, self.length, axis=1)
        return Reading(self.length + jnp.arange(tokens.shape[1]), own, segment_ids)

    def after(self, reading: "Reading", layers: PyTree[Array]) -> "KeyValueCache":
        """The cache that the layers have made longer."""
        return KeyValueCache(layers, reading.key_segments, reading.positions[-1] + 1)


class Reading(eqx.Module):
    """Where tokens stand that are read after others."""

    positions: Int[Array, " S"]
    """Their positions."""
    segments: Int[Array, "B S"]
    """Their documents."""
    key_segments: Int[Array, "B K"]
    """Those of all positions, theirs among them."""

    def attend(
        self,
        q: Float[Array, "B S H E"],
        k: Float[Array, "B S N E"],
        v: Float[Array, "B S N E"],
        mask: AttentionMask,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B S H E"], LayerCache]:
        """Attention of the tokens over all positions; returns a layer's keys and values with theirs among them."""
        start = self.positions[0]
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1) for old, new in zip(cache, (k, v), strict=True)
        )
        segments = self.segments, self.key_segments
        seen = visible(mask, self.positions, jnp.arange(keys.shape[1]), segments)
        return attend(q, keys, values, seen), (keys, values)
